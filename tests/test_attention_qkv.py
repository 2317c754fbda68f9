"""attention of [q, k, v] side by side: as that of the three, with a gradient in one tensor and nothing beside it."""

from __future__ import annotations

import pytest
import torch
from torch import library

import megakern as mk
from megakern.kernels.torch import native
from megakern.layers import attention as layer
from megakern.ops.attention import attention_qkv
from megakern.ops.attention_reference import attention_reference
from tests.closeness import assert_gradients_close
from tests.test_cpu_kernels import draw, needs_kernels

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")

# (B, T, H, D): few rows, which have no C++ kernel; one block of queries and one row more; a head dim of its own.
SHAPES = [(2, 3, 2, 8), (1, 33, 3, 32), (2, 65, 2, 13)]
OPTIONS = [{}, {"causal": False}, {"window": (9, 0)}, {"dropout_p": 0.25, "seed": 77, "dropout_offset": (3, 5)}]


def of_three(qkv, **options):
    return attention_reference(*qkv.unbind(3), **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(shape, options, dtype):
    B, T, H, D = shape
    qkv = {"qkv": draw(B, T, H, 3, D, scale=1.0).to(dtype)}
    # dq and dk are differences of rounded numbers: where few keys are seen, 2^-8 of the largest term shows.
    floor = 4e-2 if dtype == torch.bfloat16 else None
    assert_gradients_close(
        lambda qkv: attention_qkv(qkv, **options), lambda qkv: of_three(qkv, **options), qkv, floor=floor
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_the_bits_are_those_of_attention(dtype, strided):
    qkv = draw(2, 40, 2, 3, 20, dtype=dtype)
    qkv = qkv[..., :16] if strided else qkv
    ours, theirs = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    out, other = attention_qkv(ours, deterministic=True), mk.attention(*theirs.unbind(3), deterministic=True)
    dout = draw(*out.shape, dtype=dtype, seed=1)
    (gradient,), (expected,) = torch.autograd.grad(out, ours, dout), torch.autograd.grad(other, theirs, dout)
    assert torch.equal(out, other) and torch.equal(gradient, expected) and gradient.is_contiguous()


@needs_kernels
def test_gradients_go_to_strides_and_nothing_beside_them():
    """Into views of one tensor that has room for a fourth one, and for more elements in each head."""
    q, k, v, dout = (draw(2, 40, 3, 24, seed=i, scale=1.0) for i in range(4))
    how = ((-1, 0), 0.3, 0.0, 0, 1, 0, 0)
    out, lse = torch.empty_like(q), torch.empty(2, 3, 40)
    native.attention_forward(q, k, v, out, lse, torch.float32, *how)
    memory = torch.full((2, 40, 3, 4, 27), 7.0)
    strided = [memory[:, :, :, i, 1:25] for i in range(3)]
    dense = [torch.empty_like(q) for _ in range(3)]
    for places in (strided, dense):
        native.attention_backward(dout, q, k, v, out, lse, *places, torch.float32, *how)
    for a, b in zip(strided, dense, strict=True):
        assert torch.equal(a, b)
    assert (memory[..., 3, :] == 7.0).all() and (memory[..., 0] == 7.0).all() and (memory[..., 25:] == 7.0).all()


@needs_kernels
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dq": 0}, "the address of dq is null"),
        ({"dk": 6}, "the address of dk must be a multiple of 4"),
        ({"by_row": 7}, "strides of dq must be at least D = 8"),
        ({"by_row": -24}, "strides of dq must not be negative"),
    ],
)
def test_the_binding_refuses(change, message):
    from megakern import _cpu

    a = {"dq": 1 << 25, "dk": 1 << 26, "by_row": 24} | change
    problem = _cpu.AttentionProblem(1, 4, 4, 3, 3, 8, -1, 0, 1.0, 0.0, 0, 1, 0, 0, 1)
    inputs = [_cpu.AttentionTensor(1 << place, 96, 24, 8) for place in range(19, 24)]
    outputs = [_cpu.AttentionTensor(a.get(name, 1 << 27), 96, a["by_row"], 8) for name in ("dq", "dk", "dv")]
    with pytest.raises(ValueError, match=message):
        _cpu.attention_backward(problem, _cpu.AttentionBackward(*inputs, 1 << 24, *outputs), 0, 0)


def test_the_layer_takes_it_where_nothing_stands_between(monkeypatch):
    """Not with rope, grouped heads, or several documents a row."""
    called = []
    for name in ("attention", "attention_qkv"):
        op = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, op=op, name=name, **k: called.append(name) or op(*a, **k))
    x, plain = draw(1, 12, 32, scale=1.0), mk.ParallelAttention(32, 4)
    rope = (torch.ones(12, 4), torch.zeros(12, 4))
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    plain(x), plain(x, rope=rope), plain(x, cu_seqlens=ends), mk.ParallelAttention(32, 4, kv_heads=2)(x)
    assert called == ["attention_qkv", "attention", "attention", "attention"]
    # A rope that turns nothing: the same function.
    torch.testing.assert_close(plain(x), plain(x, rope=rope), rtol=0, atol=0)


def test_opcheck():
    qkv = draw(2, 9, 2, 3, 8).requires_grad_()
    how = ([-1, 0], 0.4, 0.0, 0.2, [5, 1, 2], True, "torch")
    library.opcheck(torch.ops.megakern.attention_qkv.default, (qkv, *how))
    dout, out, lse = draw(2, 9, 2, 8), draw(2, 9, 2, 8, seed=1), draw(2, 2, 9)
    library.opcheck(torch.ops.megakern.attention_qkv_backward.default, (dout, qkv.detach(), out, lse, *how))


def test_compiles_in_one_graph():
    def twice(qkv):
        return attention_qkv(qkv, window=(4, None)) + attention_qkv(qkv, dropout_p=0.2, seed=3)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert_gradients_close(compiled, twice, {"qkv": draw(2, 9, 2, 3, 8, scale=1.0)})


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"qkv must have shape \(B, T, H, 3, D\), got \(2, 5, 4, 2, 8\)"):
        attention_qkv(torch.zeros(2, 5, 4, 2, 8))
    with pytest.raises(ValueError, match="attention: dropout_p"):
        attention_qkv(torch.zeros(2, 5, 4, 3, 8), dropout_p=0.5)
