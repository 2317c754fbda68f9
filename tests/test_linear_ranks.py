"""Parallel linear layers, those of attention too, in bf16 on two and four ranks, their products by the C++ kernel under
simt and by torch: outputs and all gradients are those of the unsharded layer in float64."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import megakern as mk
from megakern.kernels.cuda import linear as cxx
from megakern.kernels.cuda import module
from megakern.ops.dispatch import use_backend
from tests.closeness import FLOOR, assert_close_to_ref

# A quarter of C and INNER is a multiple of 8: rows of 16 bytes, as the C++ product wants. 88 rows and 288 columns, or a
# half of them, are more than its tile of 64 x 128 and no multiple of it.
B, T, C, INNER, HEADS = 2, 44, 64, 288, 4
KINDS = {
    "column": {cxx.NT: 1, cxx.NN: 1, cxx.TN: 1},
    "row": {cxx.NT: 1, cxx.NN: 1, cxx.TN: 1},
    "plain": {cxx.NT: 2, cxx.NN: 1, "before": 1, cxx.TN: 2},
    "swiglu": {cxx.GATED: 1, cxx.NT: 1, cxx.NN: 2, "before": 1, cxx.TN: 3},
    "attention": {cxx.NT: 2, cxx.NN: 2, cxx.TN: 2},
}
"""Products of each layer by their layout; "before" is NN with the derivative of what came before in its epilogue."""
with_simt = pytest.mark.skipif(module._simt is None, reason="megakern._simt is not built: make simt")


def drawn(name: str, *shape: int) -> torch.Tensor:
    """fp32 normal values that bf16 has too, so that to read a weight in bf16 rounds nothing."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()))) / 4).bfloat16().float()


def make(kind: str, parallel: mk.ParallelContext | None) -> nn.Module:
    how = {"parallel": parallel, "dtype": torch.float32}
    if kind == "column":
        return mk.ColumnParallelLinear(C, INNER, activation="gelu_tanh", **how)
    if kind == "row":
        return mk.RowParallelLinear(INNER, C, **how)
    if kind == "attention":
        return mk.ParallelAttention(C, HEADS, **how)
    return mk.ParallelMLP(C, INNER, activation="gelu_tanh" if kind == "plain" else "swiglu", **how)


def plain(kind: str, x: torch.Tensor, **w: torch.Tensor) -> torch.Tensor:
    """The same without shards, in x's dtype."""
    w = {name: value.to(x.dtype) for name, value in w.items()}

    def product(x, name=""):
        return F.linear(x, w[f"{name}weight"], w[f"{name}bias"])

    if kind == "column":
        return F.gelu(product(x), approximate="tanh")
    if kind == "row":
        return product(x)
    if kind == "attention":
        q, k, v = product(x, "qkv.").view(B, T, HEADS, 3, -1).permute(3, 0, 2, 1, 4)
        return product(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), "proj.")
    gated = kind == "swiglu"
    inner = F.silu(product(x, "gate.")) * product(x, "up.") if gated else F.gelu(product(x, "fc1."), approximate="tanh")
    return product(inner, "fc2.")


def shapes(kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of x and y, in full."""
    return (B, T, INNER if kind == "row" else C), (B, T, INNER if kind == "column" else C)


def expected(kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """-> "y", "x" for its gradient, and the gradient of each parameter, in full."""
    x_shape, y_shape = shapes(kind)
    x = drawn("x", *x_shape).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {n: drawn(n, *p.shape).to(wide).requires_grad_() for n, p in make(kind, None).named_parameters()}
    y = plain(kind, x, **leaves)
    y.backward(drawn("dy", *y_shape).to(dtype))
    return {"y": y.detach(), "x": x.grad, **{name: leaf.grad for name, leaf in leaves.items()}}


def run(backend: str, tp: int, sequence: bool) -> dict[str, tuple[dict, dict, Counter]]:
    """On one rank, for each kind -> as `expected`, this rank's part of y and x; the dim along which each is split, or
    None; how often the C++ product ran, as KINDS says."""
    context = mk.ParallelContext.create(tp=tp, sequence_parallel=sequence)
    stream = 1 if sequence else None  # the residual stream is split along the tokens
    results = {}
    for kind in KINDS:
        layer = make(kind, context)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                (placement,) = parameter.placements
                dim = placement.dim if placement.is_shard() else None
                parameter.to_local().copy_(part(drawn(name, *parameter.shape), dim, tp, context.rank("tp")))
        dims = {"x": -1 if kind == "row" else stream, "y": -1 if kind == "column" else stream}
        x_shape, y_shape = shapes(kind)
        x = part(drawn("x", *x_shape), dims["x"], tp, context.rank("tp")).bfloat16().requires_grad_()
        dy = part(drawn("dy", *y_shape), dims["y"], tp, context.rank("tp")).bfloat16()
        with use_backend(backend), mock.patch.object(cxx, "product", wraps=cxx.product) as product:
            y = layer(x)
            y.backward(dy)
        mk.finish_gradients(layer.parameters())
        gradients = {name: parameter.grad.full_tensor() for name, parameter in layer.named_parameters()}
        ran = Counter("before" if "saved" in call.kwargs else call.args[0] for call in product.call_args_list)
        results[kind] = {"y": y.detach(), "x": x.grad, **gradients}, dims, ran
    return results


def part(tensor: torch.Tensor, dim: int | None, tp: int, rank: int) -> torch.Tensor:
    return tensor if dim is None else tensor.chunk(tp, dim)[rank].contiguous()


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("backend", [pytest.param("simt", marks=with_simt), "torch"])
def test_gradients_are_those_of_the_unsharded_layer(ranks, backend, tp, sequence):
    references = {kind: (expected(kind, torch.float64), expected(kind, torch.bfloat16)) for kind in KINDS}
    for rank, results in enumerate(ranks.run(run, tp, backend, tp, sequence)):
        for kind, (ours, dims, ran) in results.items():
            assert ran == (KINDS[kind] if backend == "simt" else {}), f"{kind}: products of the C++ kernel"
            wide, narrow = references[kind]
            assert ours.keys() == wide.keys()
            for name, value in ours.items():
                reference, same = (part(full[name], dims.get(name), tp, rank) for full in (wide, narrow))
                # Gradients of the fp32 weights come from bf16 factors, so theirs is the floor of bf16.
                floor = FLOOR[torch.bfloat16]
                assert_close_to_ref(value, reference, same, name=f"rank {rank}, {kind}: {name}", floor=floor)
