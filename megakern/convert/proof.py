"""Proof of a conversion, before its result gets its name: what was written is read again and compared.

Every tensor is made again from what was written, by the other direction of its rule, and compared bit for bit. Then,
where transformers is installed and has such a model, both models compute the logits of a probe in fp32: theirs by its
code from the Hugging Face side, ours by our layers from the checkpoint. One layer of ours or one module of theirs is
in memory at a time. The probe has two rows of random tokens: at the first positions, and at positions far apart.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from megakern.config import ConfigError, GPTConfig
from megakern.convert.ours import Checkpoint, chunks
from megakern.data.tokenizer import Tokenizer
from megakern.layers.block import TransformerBlock, make_norm
from megakern.model.gpt import rope_tables
from megakern.model.hf.families import Family
from megakern.model.hf.names import Read, Rule
from megakern.parallel.context import ParallelContext

TOKENS = 24
"""Of a row of the probe; more where that reaches beyond a window of up to 512 tokens."""
ROPE_POSITIONS = 4096
"""Of the probe. transformers multiplies position and frequency in fp32: at position 119,673 of a model of Qwen2-0.5B's
shape that changes its logits by 2.4e-4 of the largest, and with such angles in ours the difference is 1.6e-6."""
TOLERANCE = 1e-4
"""Largest difference of a logit, as a part of the largest logit. Measured: 5e-7 for right models of the tests' size,
1.1e-5 for one of Qwen2-0.5B's; 2.4e-4 for the wrong kind of GELU, or a base of rope of 1001 for 1000, in small models,
and 2e-2 for an epsilon of 1e-5 for 1e-6 in the larger one."""


@dataclass(frozen=True)
class Proof:
    """What was compared."""

    tensors: int
    difference: float | None = None
    """Largest difference of a logit; None: no other implementation computed them."""
    largest: float = 0.0
    """Largest logit."""
    why_not: str = ""

    def __str__(self) -> str:
        read = f"{self.tensors} tensors read again, the same bits"
        if self.difference is None:
            return f"{read}; logits not compared: {self.why_not}"
        return f"{read}; logits as transformers' to {self.difference:.1e}, the largest is {self.largest:.1f}"


class ProofError(ConfigError):
    """The written model is not the one that was read."""


def same_tensors(
    rules: list[Rule], ours: Checkpoint, theirs: Read, dtype: torch.dtype, *, exporting: bool, progress: Callable
) -> int:
    """Compares all tensors in the direction that was not used to write; returns how many. Raises ProofError."""
    wrong = []
    count = 0
    for rule in rules:
        sides = [(rule.ours, rule.shape)] if exporting else list(rule.theirs.items())
        for name, shape in sides:
            count += 1
            for start, stop in chunks(shape):
                if exporting:
                    written = rule.our_rows(theirs, start, stop)
                    read = ours.read(name, slice(start, stop)).to(dtype)
                else:
                    written = rule.their_rows(name, ours.read, start, stop)
                    read = theirs(name, slice(start, stop), None).to(dtype)
                progress(written.numel() * written.element_size())
                if written.dtype != read.dtype or not torch.equal(written, read):
                    wrong.append(f"{name}, rows {start} to {stop - 1}")
        if rule.kind == "vocab" and not exporting:
            (V, _), P = next(iter(rule.theirs.values())), rule.shape[0]
            if V < P and ours.read(rule.ours, slice(V, P)).any():
                wrong.append(f"{rule.ours}, rows {V} to {P - 1}, which are padding and must be zero")
    if wrong:
        raise ProofError("what was written is not what was read:\n  " + "\n  ".join(wrong))
    return count


SAMPLE = "The cat's 42 dogs,  naïve 漢字 🙂\n\tdef f(x):\n        return x != 3.14\n"


def same_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises ProofError when AutoTokenizer of transformers makes other tokens of a text than `tokenizer`.

    For some model types it takes a class of its own, whatever tokenizer.json says.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    found, wanted = theirs(SAMPLE, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.encode(SAMPLE)
    if found != wanted:
        raise ProofError(
            f"transformers' {type(theirs).__name__} reads this tokenizer.json in another way: of {SAMPLE!r} it makes "
            f"{found}, megakern {wanted}. AutoTokenizer takes this class for the whole family; with --no-proof the "
            f"folder is written, for PreTrainedTokenizerFast to read"
        )


def transformers_missing(family: Family, config: GPTConfig) -> str | None:
    """Why transformers cannot compute the logits of this model here; None when it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return f"transformers {transformers.__version__} is older than 5"
    if family.name == "gpt2" and not config.bias:
        return "GPT-2 of transformers always has biases"
    return None


@torch.no_grad()
def compare_logits(
    config: GPTConfig, family: Family, used: dict[str, Any], ours: Checkpoint, theirs: Read, dtype: torch.dtype
) -> tuple[float, float]:
    """(largest difference, largest logit). dtype: what weights were written in. Raises ProofError when they differ."""
    tokens, positions = _probe(config)
    stages = _our_logits(config, ours, tokens, positions)
    expected = _their_logits(family, used, theirs, dtype, tokens, positions)
    difference = (stages[-1] - expected[-1]).abs()
    worst, largest = difference.max().item(), expected[-1].abs().max().item()
    if worst <= TOLERANCE * max(largest, 1e-3):  # False for NaN
        return worst, largest
    names = ["embedding", *[f"block {i}" for i in range(config.layers)], "logits"]
    shares = [
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(stages, expected, strict=True)
    ]
    first = next((name for name, share in zip(names, shares, strict=True) if not share <= TOLERANCE), names[-1])
    where = torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), difference.shape)
    row, place, token = (int(i) for i in where)
    raise ProofError(
        f"the logits differ from those of transformers by {worst:.3g} where the largest is {largest:.3g}. The first "
        f"difference comes out of: {first} (by {shares[names.index(first)]:.1e} of its largest value); the largest is "
        f"at position {int(positions[row, place])}, token {token}"
    )


def _probe(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    window = config.window or 0
    T = min(config.sequence_length, max(TOKENS, window + TOKENS if window <= 512 else 0))
    tokens = torch.randint(config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    longest = min(config.sequence_length, ROPE_POSITIONS) if config.positions == "rope" else config.sequence_length
    spread = torch.linspace(0, longest - 1, T).long()
    return tokens, torch.stack([torch.arange(T), spread])


def _our_logits(config: GPTConfig, ours: Checkpoint, tokens: torch.Tensor, positions: torch.Tensor) -> list:
    """[embedding, each block's output, logits], fp32."""
    config = dataclasses.replace(config, dropout=0.0)

    def filled(module: nn.Module, prefix: str) -> nn.Module:
        module.to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            parameter.copy_(ours.read(f"{prefix}.{name}", slice(None)))
        return module

    hidden = _looked_up(ours.read, "embedding.weight", tokens)
    if config.positions == "learned":
        hidden = hidden + _looked_up(ours.read, "positions.weight", positions)
    rope = rope_tables(config) if config.positions == "rope" else None
    stages = [hidden]
    for i in range(config.layers):
        block = filled(TransformerBlock(config, i, device="meta", dtype=torch.float32), f"blocks.{i}")
        hidden = block(hidden, rope=rope, positions=positions if rope else None)
        stages.append(hidden)
    norm = filled(make_norm(config, ParallelContext(), device="meta", dtype=torch.float32), "norm")
    head = "embedding.weight" if config.tied_embeddings else "head.weight"
    logits = _multiplied(ours.read, head, (config.vocab_size, config.width), norm(hidden))
    return [*stages, logits]


def _looked_up(read: Read, name: str, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a table, fp32, without the table."""
    unique, inverse = indices.unique(return_inverse=True)
    rows = torch.cat([read(name, slice(i, i + 1), None) for i in unique.tolist()])
    return F.embedding(inverse, rows.float())


def _multiplied(read: Read, name: str, shape: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    """x (..., C) by the transpose of a table (V, C), a part of its rows at a time."""
    return torch.cat([x @ read(name, slice(a, b), None).float().t() for a, b in chunks(shape)], dim=-1)


def _their_logits(family, used, read: Read, dtype, tokens, positions) -> list:
    """[embedding, each layer's output, logits] of transformers' own class, fp32, a module's weights at a time."""
    import transformers

    made = getattr(transformers, family.architecture)
    # Of the file's keys only those that were understood: others may name code or kernels to be fetched.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # its defaults may lie outside the vocabulary
    config = made.config_class(**{**used, **ids}, attn_implementation="eager")
    with torch.device("meta"):
        model = made(config).eval()

    def narrow(name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        return read(name, rows, columns).to(dtype)

    embedding = model.get_input_embeddings()
    table = next(f"{path}.weight" for path, module in model.named_modules() if module is embedding)
    for path, module in list(model.named_modules()):
        if any(True for _ in module.buffers(recurse=False)):  # rope's tables, which are computed and not stored
            model.set_submodule(path, type(module)(config))
        elif module not in (embedding, model.lm_head) and any(True for _ in module.parameters(recurse=False)):
            _fill_while_it_runs(module, path, narrow)
    head = table if model.config.tie_word_embeddings else "lm_head.weight"
    shape = tuple(embedding.weight.shape)
    base = model.base_model
    embedding.forward = lambda ids: _looked_up(narrow, table, ids)
    model.lm_head.forward = lambda x: _multiplied(narrow, head, shape, x)
    stages: list = []
    layers = base.h if family.name == "gpt2" else base.layers
    layers[0].register_forward_pre_hook(lambda _, arguments: stages.append(arguments[0]))
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, output: stages.append(output[0] if isinstance(output, tuple) else output)
        )
    # With a mask: without one, positions that are not one after the other are taken for several packed texts.
    logits = model(
        input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits
    return [*stages, logits]


def _fill_while_it_runs(module: nn.Module, path: str, read: Read) -> None:
    """Gives a module on "meta" its weights when it is called, and takes them away after it."""
    empty = dict(module.named_parameters(recurse=False))

    def fill(*_) -> None:
        for name in empty:
            module._parameters[name] = nn.Parameter(read(f"{path}.{name}", slice(None)).float(), requires_grad=False)

    def drop(*_) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)
