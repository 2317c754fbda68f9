"""Training steps of megakern and of its peers: the same weights, batches, optimizer and clipping for all.

A contestant's name is who made it, and how: "plain fp32", "plain bf16 autocast", "plain bf16 compiled" (autocast
too), "transformers ..." likewise (and with " patched" at its end after `mk.patch`), "Megatron-Core bf16 masters"
(bf16 weights, fp32 masters: its own way), "megakern fp32", "megakern fp32 bf16 products" (`train.matmul_precision =
"medium"`), "megakern bf16", "megakern bf16 split" (bf16 weights, and the bits that masters have more), "megakern bf16
split lean" (moments in bf16 too, each block computed again in backward). "plain" is peers/plain_gpt.py: fp32 and eager
is what nanoGPT does by default on a CPU, "bf16 compiled" its best.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.contestants import NotHereError
from benchmarks.peers.libraries import why_not
from megakern.layers.parameter import accumulate_in_fp32
from megakern.ops.grad_norm import clip_coefficient, gradient_norm
from megakern.parallel.collectives import finish_gradients
from megakern.parallel.context import ParallelContext
from megakern.train import build, machine
from megakern.train.config import RunConfig, make_config

ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
Step = Callable[[torch.Tensor, torch.Tensor], float]


def make_step(name: str, config: mk.GPTConfig, device: torch.device) -> Step:
    """tokens, targets (B, T) -> the loss before this step's update. Raises NotHereError."""
    maker, _, how = name.partition(" ")
    if maker == "megakern":
        return our_step(how, config, device)
    if maker == "plain":
        if config.positions == "rope":
            raise NotHereError("the plain GPT is a GPT-2; beside a Llama stands transformers'")
        model = plain_model(config, device)
        return torch_step(model, model, how, device)
    reason = why_not(maker, device.type)
    if reason is not None:
        raise NotHereError(reason)
    if maker == "Megatron-Core":
        if config.positions == "rope":
            raise NotHereError("its peer here is a GPT-2; beside a Llama stands transformers'")
        from benchmarks.peers import megatron

        model = megatron.model_of(config, plain_weights(config, device), device)
        return torch_step(model, megatron.loss_of(model), how, device)
    from benchmarks.peers import hugging_face

    model = hugging_face.model_of(config, device, None if config.positions == "rope" else plain_weights(config, device))

    if how.endswith("patched"):
        mk.patch(model)
        how = how.removesuffix(" patched")

        def loss_of(tokens, targets):
            return model(tokens, labels=targets, shift_labels=targets).loss

        return torch_step(model, loss_of, how, device)

    def loss_of(tokens, targets):
        logits = model(tokens).logits
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))

    return torch_step(model, loss_of, how, device)


def torch_step(model: torch.nn.Module, loss_of: Callable, how: str, device: torch.device) -> Step:
    """How a training loop in plain PyTorch goes: autocast, backward, clip, step; or bf16 weights with fp32 masters."""
    fused = {"fused": True} if device.type == "cuda" else {}
    parameters = list(model.parameters())
    masters = [p.detach().float().requires_grad_() for p in parameters] if "masters" in how else parameters
    if "masters" in how:
        model.bfloat16()
    decay = [p for p in masters if p.ndim >= 2]
    rest = [p for p in masters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": ADAMW["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=ADAMW["betas"], **fused)
    forward = torch.compile(loss_of) if "compiled" in how else loss_of
    autocast = how in ("bf16 autocast", "bf16 compiled")

    def step(tokens, targets) -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = forward(tokens, targets)
        loss.backward()
        if masters is not parameters:
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if masters is not parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        return loss.item()

    return step


def run_config(config: mk.GPTConfig, how: str) -> RunConfig:
    """Settings of a `megakern train` that does what `how` says: a precision, "fp32 bf16 products", "bf16 split", or
    "bf16 split lean"."""
    rounded, lean = how.endswith(" bf16 products"), how.endswith(" lean")
    precision, _, master = how.removesuffix(" bf16 products").removesuffix(" lean").partition(" ")
    train = {"precision": precision, "matmul_precision": "medium" if rounded else "highest"}
    optimizer = {"master": master or "none", "weight_decay": ADAMW["weight_decay"], "lr": ADAMW["lr"]}
    if lean:
        train["recompute"], optimizer["state_dtype"] = "full", "bfloat16"
    table = {"train": train, "optimizer": optimizer}
    return dataclasses.replace(make_config(table, [], "the benchmark's settings"), model=config)


def our_step(how: str, config: mk.GPTConfig, device: torch.device) -> Step:
    """The model and optimizer that `megakern train` makes, and its step."""
    machine.keep_freed_memory()
    settings = run_config(config, how)
    torch.set_float32_matmul_precision(settings.train.matmul_precision)
    model = build.make_model(settings, ParallelContext(), "meta")
    values = our_weights(config, device)
    if config.positions == "rope":  # with tables that are no parameters
        build.fill_model(model, settings, device)
    else:  # without the initial values, which take seconds and are written over
        model.to_empty(device=device)
        if settings.optimizer.master != "none":
            accumulate_in_fp32(model)
    optimizer = build.make_optimizer(model, settings)
    if values is None:
        build.start_masters(model, optimizer, settings)
    else:
        copy_weights(model, values)
        for name, parameter in model.named_parameters() if settings.optimizer.master != "none" else ():
            optimizer.set_master(parameter, values[name].to(device, torch.float32))
    for group in optimizer.param_groups:
        group["lr"] = ADAMW["lr"] * group.get("lr_scale", 1.0)
        group["betas"] = ADAMW["betas"]
    return step_of(model, optimizer)


def step_of(model: torch.nn.Module, optimizer: mk.AdamW) -> Step:
    """A step of `megakern train` without its log: clipping is a factor of the update, on any layout."""
    parameters = list(model.parameters())

    def step(tokens, targets) -> float:
        loss = model(tokens, targets)
        loss.backward()
        finish_gradients(parameters)
        norm = gradient_norm(parameters)
        optimizer.step(grad_scale=clip_coefficient(norm, 1.0) if norm.item() > 1.0 else None)
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


# --- the same weights ---


@torch.no_grad()
def copy_weights(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    ours = dict(model.named_parameters())
    assert ours.keys() == values.keys(), sorted(ours.keys() ^ values.keys())
    for name, parameter in ours.items():
        parameter.copy_(values[name])


def plain_shape(config: mk.GPTConfig) -> dict[str, int]:
    names = ("layers", "width", "heads", "vocab_size", "sequence_length")
    return {name: getattr(config, name) for name in names}


def plain_model(config: mk.GPTConfig, device: torch.device) -> torch.nn.Module:
    from benchmarks.peers.plain_gpt import PlainGPT

    torch.manual_seed(0)
    with device:
        return PlainGPT(**plain_shape(config))


def plain_weights(config: mk.GPTConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """The start of every GPT-2: the plain model's weights from a fixed seed, made on the device."""
    from benchmarks.peers.plain_gpt import PlainGPT

    torch.manual_seed(0)
    with device:
        return PlainGPT(**plain_shape(config)).state_dict()


def our_weights(config: mk.GPTConfig, device: torch.device) -> dict[str, torch.Tensor] | None:
    """The same by our names; of a Llama those of transformers' model, or None where that is not installed."""
    if config.positions != "rope":
        return from_plain(plain_weights(config, device), config)
    if why_not("transformers", device.type) is not None:
        return None
    from benchmarks.peers import hugging_face

    return hugging_face.llama_weights(config, device)


def from_plain(plain: dict[str, torch.Tensor], config: mk.GPTConfig) -> dict[str, torch.Tensor]:
    """Plain's fused [all q; all k; all v] rows become [q, k, v] for each head."""
    H, D = config.heads, config.size_of_head

    def grouped(rows):
        return rows.view(3, H, D, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    names = {"tokens.weight": "embedding.weight", "positions.weight": "positions.weight"}
    parts = {"attention.qkv": "attention.qkv", "attention.proj": "attention.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    parts |= {"norm1": "norm1", "norm2": "norm2"}
    for layer in range(config.layers):
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{theirs}.{kind}"] = f"blocks.{layer}.{ours}.{kind}"
    names |= {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    return {ours: grouped(plain[theirs]) if ".qkv." in ours else plain[theirs] for theirs, ours in names.items()}
