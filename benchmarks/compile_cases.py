"""The launches that `compile_report.py` compiles: for each kernel its dtypes, options and configurations.

Each case calls a launcher of `megakern/kernels/triton/` with meta tensors, so signatures cannot drift from the code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from megakern.kernels.triton import (
    activation,
    adamw,
    attention,
    attention_configs,
    attention_decode,
    cross_entropy,
    dropout,
    grad_norm,
    linear,
    linear_cross_entropy,
    mlp,
    norm,
    rope,
)
from megakern.kernels.triton.tile_config import Choice
from megakern.ops.activation import KINDS

CASES: dict[str, Callable[[], object]] = {}

SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ROWS = 4096


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(C: int, dtype: torch.dtype, centre: bool, residual: bool, weight_dtype: torch.dtype) -> None:
    x, weight = tensor(ROWS, C, dtype=dtype), tensor(C, dtype=weight_dtype)
    y, _, mean, rstd = norm.norm_forward(x, weight, weight if centre else None, x if residual else None, 1e-5, centre)
    norm.norm_backward(y, y if residual else None, x, weight, mean, rstd, centre, centre)


def _add_norms() -> None:
    widths = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    for C in widths:
        for centre in (True, False):
            for dtype in SHORT:
                name = f"{'layer' if centre else 'rms'}_norm {C} {SHORT[dtype]}"
                CASES[name] = partial(_norm, C, dtype, centre, False, dtype)
                if dtype != torch.float16:
                    CASES[f"{name} residual"] = partial(_norm, C, dtype, centre, True, torch.float32)


def _activation(x: torch.Tensor, kind: str) -> None:
    activation.activation_backward(activation.activation_forward(x, kind), x, kind)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> None:
    activation.swiglu_backward(activation.swiglu_forward(gate, up), gate, up)


def _add_elementwise() -> None:
    for dtype, short in SHORT.items():
        flat = tensor(ROWS, 1024, dtype=dtype)
        for kind in KINDS:
            CASES[f"gelu {kind} {short}"] = partial(_activation, flat, kind)
        CASES[f"swiglu {short}"] = partial(_swiglu, flat, flat)
        CASES[f"swiglu halves {short}"] = partial(_swiglu, *tensor(ROWS, 2048, dtype=dtype).chunk(2, -1))
        CASES[f"dropout {short}"] = partial(dropout.dropout, flat, None, 0.1, 12345, (0, 1, 1))
        CASES[f"dropout residual {short}"] = partial(dropout.dropout, flat, flat, 0.1, 12345, (0, 64, 512))
    for C in (16, 128, 512):
        CASES[f"swiglu halves {C}"] = partial(_swiglu, *tensor(ROWS, 2 * C).chunk(2, -1))


def _add_rope() -> None:
    for D, d in ((64, 32), (128, 64), (80, 16), (256, 128)):
        for dtype in SHORT:
            q, k = tensor(2, 512, 32, D, dtype=dtype), tensor(2, 512, 8, D, dtype=dtype)
            table, positions = tensor(2048, d, dtype=torch.float32), tensor(2, 512, dtype=torch.int64)
            for interleaved in (False, True):
                name = f"rope {'interleaved' if interleaved else 'halves'} {D} {d} {SHORT[dtype]}"
                CASES[name] = partial(rope.rope, q, k, table, table, None, interleaved, False)
            CASES[f"rope positions {D} {d} {SHORT[dtype]}"] = partial(
                rope.rope, q, k, table, table, positions, False, True
            )
    for interleaved in (False, True):  # q, k and table of the last size
        name = f"rope in place {'interleaved' if interleaved else 'halves'}"
        CASES[name] = partial(rope.rope, q, k, table, table, None, interleaved, False, True)


def _cross_entropy(logits: torch.Tensor, smoothing: float) -> None:
    V, targets = logits.shape[-1], tensor(ROWS, dtype=torch.int64)
    options = (-100, smoothing, 1e-4, V, "")
    loss, lse = cross_entropy.cross_entropy_forward(logits, targets, *options)
    cross_entropy.cross_entropy_backward(loss, logits, targets, lse, *options)
    cross_entropy.scale_(logits, tensor(dtype=torch.float32))


def _add_cross_entropy() -> None:
    for dtype, short in SHORT.items():
        for smoothing in (0.0, 0.1):
            name = f"cross_entropy {short}{' smooth' if smoothing else ''}"
            CASES[name] = partial(_cross_entropy, tensor(ROWS, 32000, dtype=dtype), smoothing)


def _adamw(param: torch.Tensor, grad: torch.Tensor, moment: torch.Tensor, master: torch.Tensor | None) -> None:
    masters = [] if master is None else [master]
    options = (3, 1e-3, 0.9, 0.95, 1e-8, 0.1)
    adamw.adamw([param], [grad], [moment], [moment], masters, tensor(1, dtype=torch.float32), False, *options)


def _add_optimizer() -> None:
    fp32, bf16, fp16, int16 = (
        tensor(ROWS, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.int16)
    )
    kinds = {"fp32": (fp32, None), "bf16": (bf16, fp32), "bf16 split": (bf16, int16), "fp16": (fp16, fp32)}
    for name, (param, master) in kinds.items():
        for moment in (fp32, bf16):
            short = SHORT[moment.dtype]
            CASES[f"AdamW {name} moments {short}"] = partial(_adamw, param, param, moment, master)
            if param is bf16:
                CASES[f"AdamW {name} moments {short} gradients fp32"] = partial(_adamw, param, fp32, moment, master)
    for value in (fp32, bf16, fp16):
        CASES[f"clip_grad_norm_ {SHORT[value.dtype]}"] = partial(grad_norm.sum_of_squares, [value])


def _linear(size: int, dtype: torch.dtype, activation: str, full: bool) -> None:
    x, weight = tensor(size, size, dtype=dtype), tensor(size, size, dtype=dtype)
    bias = tensor(size, dtype=torch.float32) if full else None
    y, _ = linear.linear_forward(x, weight, bias, x if full else None, activation, bool(activation))
    linear.linear_input_gradient(y, weight, None)
    linear.linear_weight_gradient(y, x, dtype, torch.float32 if full else None)
    linear.linear_accumulate_weight_gradient(tensor(size, size, dtype=torch.float32), y, x, None)


def _accumulate(size: int, dtype: torch.dtype) -> None:
    x = tensor(size, size, dtype=dtype)
    linear.linear_accumulate_weight_gradient(tensor(size, size, dtype=dtype), x, x, None)


def _linear_swiglu(size: int, dtype: torch.dtype) -> None:
    x, weight = tensor(size, size, dtype=dtype), tensor(size, size, dtype=dtype)
    y, gate, up = mlp.linear_swiglu_forward(x, weight, weight, None, None, True)
    mlp.linear_activation_gradient(y, weight, gate, up, "silu")


def _activation_gradient(size: int, dtype: torch.dtype, activation: str) -> None:
    dy, weight = tensor(size, size, dtype=dtype), tensor(size, size, dtype=dtype)
    mlp.linear_activation_gradient(dy, weight, dy, None, activation)


def _add_linear() -> None:
    for dtype, short in SHORT.items():
        CASES[f"linear {short}"] = partial(_linear, 4096, dtype, "", False)
        CASES[f"linear {short} gelu_tanh bias residual"] = partial(_linear, 4096, dtype, "gelu_tanh", True)
        if dtype != torch.float32:  # into fp32 is one of the first case
            CASES[f"linear {short} into {short}"] = partial(_accumulate, 4096, dtype)
        CASES[f"linear_swiglu {short}"] = partial(_linear_swiglu, 4096, dtype)
        CASES[f"linear {short} gradient gelu_tanh"] = partial(_activation_gradient, 4096, dtype, "gelu_tanh")
        for kind in KINDS:
            CASES[f"linear {short} {kind}"] = partial(_linear, 4096, dtype, kind, False)


def _linear_cross_entropy(dtype: torch.dtype) -> None:
    x, weight, targets = (
        tensor(ROWS, 1024, dtype=dtype),
        tensor(32000, 1024, dtype=dtype),
        tensor(ROWS, dtype=torch.int64),
    )
    linear_cross_entropy.linear_cross_entropy_sum(x, weight, targets, True, True, -100, 0.0, 0.0, 32000, "")


def _attention(
    D: int,
    dtype: torch.dtype,
    window=(-1, 0),
    softcap=0.0,
    alibi=False,
    dropout_p=0.0,
    packed=False,
    every=False,
) -> None:
    """every: all configurations that may run, not the table's choice alone."""
    shape = (2048,) if packed else (2, 2048)
    q = tensor(*shape, 8, D, dtype=dtype)
    k, v = (tensor(*shape, 4, D, dtype=dtype) for _ in range(2))
    offsets = tensor(5, dtype=torch.int32) if packed else None
    slopes = tensor(8, dtype=torch.float32) if alibi else None
    how = (offsets, offsets, slopes, window, D**-0.5, softcap, dropout_p, (12345, 0, 0), True)
    whole = attention_configs.attention
    table = lambda *problem: Choice(whole(*problem).options[:1])  # noqa: E731
    with mock.patch.object(attention_configs, "attention", whole if every else table):
        out, lse = attention.attention_forward(q, k, v, *how)
        attention.attention_backward(out, q, k, v, out, lse, *how)


def _add_attention() -> None:
    for dtype, short in SHORT.items():
        for D in (16, 64, 80, 128, 256):
            CASES[f"attention {D} {short}"] = partial(_attention, D, dtype, every=True)
    for D in (32, 192):  # the other power of two; columns past D in the largest tiles
        CASES[f"attention {D} bf16"] = partial(_attention, D, torch.bfloat16, every=True)
    options = {"window": (128, 0)}, {"softcap": 30.0}, {"alibi": True}, {"dropout_p": 0.1}, {"packed": True}
    everything = {name: value for option in options for name, value in option.items() if name != "alibi"}
    for option in options:
        CASES[f"attention 128 bf16 {next(iter(option))}"] = partial(_attention, 128, torch.bfloat16, **option)
    for D in (64, 128, 256):
        CASES[f"attention {D} bf16 with everything"] = partial(_attention, D, torch.bfloat16, **everything)


def _decode(D: int, dtype: torch.dtype, page: int | None = None, T: int = 1, window=(-1, 0), softcap=0.0, alibi=False):
    q, lengths = tensor(2, T, 32, D, dtype=dtype), tensor(2, dtype=torch.int32)
    shape = (2, 8192, 4, D) if page is None else (16384 // page, page, 4, D)
    k, v = (tensor(*shape, dtype=dtype) for _ in range(2))
    table = None if page is None else tensor(2, 8192 // page, dtype=torch.int32)
    slopes = tensor(32, dtype=torch.float32) if alibi else None
    attention_decode.decode(q, k, v, table, None if page is None else lengths, slopes, window, D**-0.5, softcap)


def _add_decode() -> None:
    for D in (16, 32, 64, 128, 256):
        for dtype, short in SHORT.items():
            CASES[f"attention decode {D} {short}"] = partial(_decode, D, dtype)
            for T in () if dtype == torch.float32 else (4, 8):  # fp32 has one tile for any number of rows
                CASES[f"attention decode {D} {short} {8 * T} rows"] = partial(_decode, D, dtype, T=T)
    for page in (16, 256):
        CASES[f"paged_attention 128 bf16 {page}"] = partial(_decode, 128, torch.bfloat16, page)
    CASES["paged_attention 128 bf16 with everything"] = partial(
        _decode, 128, torch.bfloat16, 16, window=(128, 0), softcap=30.0, alibi=True
    )
    for dtype in (torch.float16, torch.float32):
        CASES[f"paged_attention 128 {SHORT[dtype]}"] = partial(_decode, 128, dtype, 16)


for dtype, short in SHORT.items():
    CASES[f"linear_cross_entropy {short}"] = partial(_linear_cross_entropy, dtype)
_add_attention()
_add_decode()
_add_linear()
_add_norms()
_add_optimizer()
_add_elementwise()
_add_rope()
_add_cross_entropy()
