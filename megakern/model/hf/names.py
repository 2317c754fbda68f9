"""Which tensors of a Hugging Face model make which of ours, and how rows of one are read from rows of the other.

Letters: V vocabulary, P padded vocabulary, C channels, H query heads, G key-value heads, n = H/G, D head dim.

    same     ours (N, K) or (N,)                       theirs the same
    vocab    ours (P, C), zero from row V on           theirs (V, C)
    turned   ours (N, K)                               theirs (K, N): GPT-2's Conv1D
    qkv      ours (G (n + 2) D, C) or (G (n + 2) D,), the rows of a group are [q .. q, k, v]
             theirs three tensors (H D, C), (G D, C), (G D, C), or without C
    fused    as qkv with n = 1                         theirs (C, 3 C) or (3 C,), columns [all q, all k, all v]

Nothing is computed, only moved, so both directions are exact. Tensors are read in slices: `Read` is
read(name, rows, columns) -> tensor, where columns = None are all of them, or there is one dim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megakern.config import GPTConfig
from megakern.model.hf.families import Family

Read = Callable[[str, slice, slice | None], torch.Tensor]
ALL = slice(None)


@dataclass(frozen=True)
class Rule:
    """How one of our tensors and one or three of theirs are made of each other."""

    ours: str
    shape: tuple[int, ...]
    """Of ours, whole, with the vocabulary's padding."""
    theirs: dict[str, tuple[int, ...]]
    """Name -> shape, in the order q, k, v where there are three."""
    kind: str
    group: tuple[int, int] = (1, 1)
    """(n, D) of qkv and fused."""

    def our_rows(self, read: Read, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop - 1 of ours from theirs, contiguous or a view of what was read."""
        names = list(self.theirs)
        if self.kind == "same":
            return read(names[0], slice(start, stop), None)
        if self.kind == "turned":
            return read(names[0], ALL, slice(start, stop)).t()
        if self.kind == "vocab":
            V = self.theirs[names[0]][0]
            rows = read(names[0], slice(min(start, V), min(stop, V)), None)
            return torch.cat([rows, rows.new_zeros(stop - start - len(rows), *rows.shape[1:])])
        n, D = self.group
        unit = (n + 2) * D
        first, last = start // unit, -(-stop // unit)
        parts = [
            self._part(read, i, first * size, last * size).unflatten(0, (last - first, size))
            for i, size in enumerate((n * D, D, D))
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)[start - first * unit : stop - first * unit]

    def _part(self, read: Read, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of q, k or v (i = 0, 1, 2) of theirs."""
        names = list(self.theirs)
        if self.kind == "qkv":
            return read(names[i], slice(start, stop), None)
        at = slice(i * self.shape[0] // 3 + start, i * self.shape[0] // 3 + stop)
        return read(names[0], at, None) if len(self.shape) == 1 else read(names[0], ALL, at).t()

    def their_rows(self, name: str, read: Read, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop - 1 of `name` of theirs from ours."""
        if self.kind in ("same", "vocab"):
            return read(self.ours, slice(start, stop), None)
        if self.kind == "turned":
            return read(self.ours, ALL, slice(start, stop)).t()
        n, D = self.group
        if self.kind == "qkv":
            letter = list(self.theirs).index(name)
            size, at = (n * D if letter == 0 else D), (0, n, n + 1)[letter]
            first, last = start // size, -(-stop // size)
            rows = read(self.ours, slice(first * (n + 2) * D, last * (n + 2) * D), None)
            heads = rows.unflatten(0, (last - first, n + 2, D))[:, at : at + size // D]
            return heads.flatten(0, 2)[start - first * size : stop - first * size]
        columns = None if len(self.shape) == 1 else slice(start, stop)
        whole = read(self.ours, ALL, columns).unflatten(0, (-1, 3, D)).transpose(0, 1).flatten(0, 2)
        return whole[start:stop] if columns is None else whole.t()


def rules_of(config: GPTConfig, family: Family) -> list[Rule]:
    """One rule for each parameter of `GPT(config)`. The config is one that the family has (`family_of`)."""
    return list(_gpt2(config) if family.name == "gpt2" else _llama(config))


def _vocab(config: GPTConfig, ours: str, theirs: str) -> Rule:
    C = config.width
    return Rule(ours, (config.padded_vocab_size, C), {theirs: (config.vocab_size, C)}, "vocab")


def _gpt2(config: GPTConfig) -> Iterator[Rule]:
    C, F, T = config.width, config.size_of_ffn, config.sequence_length
    yield _vocab(config, "embedding.weight", "transformer.wte.weight")
    yield Rule("positions.weight", (T, C), {"transformer.wpe.weight": (T, C)}, "same")

    def norm(ours: str, theirs: str) -> Iterator[Rule]:
        for kind in ("weight", "bias") if config.bias else ("weight",):
            yield Rule(f"{ours}.{kind}", (C,), {f"{theirs}.{kind}": (C,)}, "same")

    def linear(ours: str, theirs: str, N: int, K: int, kind: str = "turned") -> Iterator[Rule]:
        group = (1, config.size_of_head)
        yield Rule(f"{ours}.weight", (N, K), {f"{theirs}.weight": (K, N)}, kind, group)
        if config.bias:
            kind = "same" if kind == "turned" else kind
            yield Rule(f"{ours}.bias", (N,), {f"{theirs}.bias": (N,)}, kind, group)

    for i in range(config.layers):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        yield from norm(f"{ours}norm1", f"{theirs}ln_1")
        yield from linear(f"{ours}attention.qkv", f"{theirs}attn.c_attn", 3 * C, C, "fused")
        yield from linear(f"{ours}attention.proj", f"{theirs}attn.c_proj", C, C)
        yield from norm(f"{ours}norm2", f"{theirs}ln_2")
        yield from linear(f"{ours}mlp.fc1", f"{theirs}mlp.c_fc", F, C)
        yield from linear(f"{ours}mlp.fc2", f"{theirs}mlp.c_proj", C, F)
    yield from norm("norm", "transformer.ln_f")
    if not config.tied_embeddings:
        yield _vocab(config, "head.weight", "lm_head.weight")


def _llama(config: GPTConfig) -> Iterator[Rule]:
    C, F, D = config.width, config.size_of_ffn, config.size_of_head
    H, G = config.heads, config.key_value_heads
    yield _vocab(config, "embedding.weight", "model.embed_tokens.weight")

    def same(ours: str, theirs: str, *shape: int) -> Rule:
        return Rule(f"{ours}.weight", shape, {f"{theirs}.weight": shape}, "same")

    for i in range(config.layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        attention = f"{theirs}self_attn."
        yield same(f"{ours}norm1", f"{theirs}input_layernorm", C)
        for kind, more in (("weight", (C,)), ("bias", ())):
            if kind == "weight" or config.qkv_bias:
                parts = {
                    f"{attention}{letter}_proj.{kind}": (heads * D, *more)
                    for letter, heads in (("q", H), ("k", G), ("v", G))
                }
                yield Rule(f"{ours}attention.qkv.{kind}", ((H + 2 * G) * D, *more), parts, "qkv", (H // G, D))
        if config.qk_norm:
            yield same(f"{ours}attention.q_norm", f"{attention}q_norm", D)
            yield same(f"{ours}attention.k_norm", f"{attention}k_norm", D)
        yield same(f"{ours}attention.proj", f"{attention}o_proj", C, H * D)
        yield same(f"{ours}norm2", f"{theirs}post_attention_layernorm", C)
        yield same(f"{ours}mlp.gate", f"{theirs}mlp.gate_proj", F, C)
        yield same(f"{ours}mlp.up", f"{theirs}mlp.up_proj", F, C)
        yield same(f"{ours}mlp.fc2", f"{theirs}mlp.down_proj", C, F)
    yield same("norm", "model.norm", C)
    if not config.tied_embeddings:
        yield _vocab(config, "head.weight", "lm_head.weight")


# Tensors of theirs that hold nothing learned: masks, and tables that the config gives.
_BUFFERS = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


def tensor_problems(
    rules: list[Rule], shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], *, tied: bool, one_dtype: bool
) -> list[str]:
    """Everything in which tensors of `shapes` and `dtypes` (as "float32") are not those that `rules` read."""
    wanted = {name: shape for rule in rules for name, shape in rule.theirs.items()}
    if tied and "lm_head.weight" in shapes:  # some files hold it twice
        wanted["lm_head.weight"] = next(iter(rules[0].theirs.values()))
    problems = [f"{name}: missing, it must have shape {list(wanted[name])}" for name in wanted if name not in shapes]
    extra = sorted(name for name in shapes if name not in wanted and not _BUFFERS.fullmatch(name))
    problems += [f"{name}: not a tensor of this model (shape {list(shapes[name])})" for name in extra]
    kinds: dict[str, list[str]] = {}
    for name in [name for name in wanted if name in shapes]:
        if shapes[name] != wanted[name]:
            problems.append(f"{name}: shape must be {list(wanted[name])}, got {list(shapes[name])}")
        if dtypes[name] not in ("float32", "bfloat16", "float16"):
            problems.append(f"{name}: dtype must be float32, bfloat16 or float16, got {dtypes[name]}")
        else:
            kinds.setdefault(dtypes[name], []).append(name)
    if one_dtype and len(kinds) > 1:
        found = "; ".join(f"{len(names)} are {dtype}, as {names[0]}" for dtype, names in sorted(kinds.items()))
        problems.append(f"tensors of several dtypes: {found}; choose one for all with --dtype")
    return problems
