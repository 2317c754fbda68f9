"""The gated product and the gradients that meet before an activation, of every compiled backend, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import library
from torch.nn import functional as F

import megakern as mk
from megakern.kernels.cuda.linear_plan import GATED, NN, TILES
from megakern.ops.activation import KINDS, activation_reference
from megakern.ops.linear import input_gradient
from megakern.ops.mlp import activation_gradient, linear_activated, linear_after, linear_swiglu_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import draw, fenced
from tests.kernels.test_linear import COMPILED, DTYPES, cxx, multiply, size_of, skip_unless

OP = "linear_swiglu"
# (leading dims of x, N, K): smallest, primes, beside a tile of 64, several tiles and steps, no rows; then by eights.
SHAPES = [((1,), 1, 1), ((7,), 13, 5), ((2, 3), 65, 64), ((130,), 70, 140), ((0,), 4, 8)]
SHAPES_BY_8 = [((1,), 8, 8), ((7,), 16, 24), ((2, 3), 72, 64), ((130,), 136, 264), ((0,), 8, 16)]
BEFORE = [*KINDS, "swiglu"]


def make(lead, N, K, dtype, device, *, bias=True):
    inputs = {
        "x": draw(*lead, K, dtype=dtype, device=device),
        "gate_weight": draw(N, K, dtype=dtype, device=device, seed=1, scale=K**-0.5),
        "up_weight": draw(N, K, dtype=dtype, device=device, seed=2, scale=K**-0.5),
    }
    if bias:
        inputs |= {"gate_bias": draw(N, device=device, seed=3), "up_bias": draw(N, device=device, seed=4)}
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_swiglu_outputs_and_gradients(case, dtype, device, backend):
    lead, N, K = size_of(backend, SHAPES, SHAPES_BY_8)[case]
    skip_unless(backend, dtype)
    ours = partial(mk.linear_swiglu, backend=backend)
    assert_gradients_close(ours, linear_swiglu_reference, make(lead, N, K, dtype, device, bias=case % 2 == 1))


@pytest.mark.parametrize("present", ["gate_bias", "up_bias", "one of fp32"])
def test_biases_of_one_side_and_of_two_dtypes(present, device, backend):
    inputs = make((9,), *size_of(backend, (17, 33), (24, 40)), torch.float16, device)
    if present == "one of fp32":
        inputs["up_bias"] = inputs["up_bias"].half()
    else:
        inputs = {name: value for name, value in inputs.items() if "bias" not in name or name == present}
    assert_gradients_close(partial(mk.linear_swiglu, backend=backend), linear_swiglu_reference, inputs)


def saved(kind, M, K, dtype, device):
    pre = draw(M, K, dtype=dtype, device=device, seed=2, scale=2.0)
    return pre, draw(M, K, dtype=dtype, device=device, seed=3) if kind == "swiglu" else None


def gradient_reference(dy, weight, pre, up, kind):
    """By autograd, through the activation and the layer that reads it."""
    leaves = [x.detach().clone().requires_grad_() for x in (pre, up) if x is not None]
    inner = F.silu(leaves[0]) * leaves[1] if kind == "swiglu" else activation_reference(leaves[0], kind)
    return torch.autograd.grad(F.linear(inner, weight), leaves, dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BEFORE)
def test_the_gradient_before_an_activation(kind, dtype, device, backend):
    skip_unless(backend, dtype)
    for M, N, K in size_of(backend, [(1, 1, 1), (67, 33, 70)], [(1, 8, 8), (67, 40, 72), (0, 8, 16)]):
        dy = draw(M, N, dtype=dtype, device=device)
        weight = draw(N, K, dtype=dtype, device=device, seed=1, scale=N**-0.5)
        pre, up = saved(kind, M, K, dtype, device)
        found, again = (activation_gradient(dy, weight, pre, up, kind, backend) for _ in range(2))
        arguments = [dy, weight, pre, up]
        wide = gradient_reference(*(None if x is None else x.double() for x in arguments), kind)
        for ours, twice, reference, same in zip(found, again, wide, gradient_reference(*arguments, kind), strict=False):
            assert_close_to_ref(ours, reference, same)
            assert torch.equal(ours, twice)
        assert up is not None or found[1].numel() == 0


def test_nan_beside_what_is_saved_never_leaks_in(device, backend):
    M, N, K = 10, *size_of(backend, (30, 70), (40, 72))
    dy, weight = draw(M, N, dtype=torch.float16, device=device), draw(N, K, dtype=torch.float16, device=device, seed=1)
    for kind in ("gelu_tanh", "swiglu"):
        pre, up = saved(kind, M, K, torch.float16, device)
        plain = activation_gradient(dy, weight, pre, up, kind, backend)
        fences = [None if x is None else fenced(x) for x in (pre, up)]
        for one, other in zip(plain, activation_gradient(dy, fenced(weight), *fences, kind, backend), strict=True):
            assert torch.equal(one, other) and one.isfinite().all()


def test_a_gradient_may_be_added_to_another(device, backend):
    N, K = size_of(backend, (30, 70), (40, 72))
    dy, weight, other = (
        draw(*s, dtype=torch.float16, device=device, seed=i) for i, s in enumerate([(9, N), (N, K), (9, K)])
    )
    wide = dy.double() @ weight.double() + other.double()
    assert_close_to_ref(input_gradient(dy, weight, other, backend), wide, wide.half())


@pytest.mark.parametrize("kind", BEFORE)
def test_two_layers_around_an_activation(kind, device, backend):
    """linear_activated and linear_after as autograd sees them, against the plain layers."""
    K, N, C = size_of(backend, (9, 20, 11), (16, 40, 24))
    inputs = {name: value for name, value in make((3, 5), N, K, torch.float16, device).items() if "up" not in name}
    if kind == "swiglu":
        inputs = make((3, 5), N, K, torch.float16, device)
    inputs["after"] = draw(C, N, dtype=torch.float16, device=device, seed=5, scale=N**-0.5)
    inputs["after_bias"] = draw(C, device=device, seed=6)
    inputs["residual"] = draw(3, 5, C, dtype=torch.float16, device=device, seed=7)

    def ours(x, after, after_bias, residual, **first):
        pairs = [(first[f"{name}_weight"], first[f"{name}_bias"]) for name in ("gate", "up")[: len(first) // 2]]
        with mk.use_backend(backend):
            return linear_after(linear_activated(x, pairs, kind), after, after_bias, residual)

    def reference(x, after, after_bias, residual, **first):
        first = {name: value.to(x.dtype) for name, value in first.items()}
        gate = F.linear(x, first["gate_weight"], first["gate_bias"])
        inner = linear_swiglu_reference(x, **first) if kind == "swiglu" else activation_reference(gate, kind)
        return F.linear(inner, after, after_bias.to(x.dtype)) + residual

    assert_gradients_close(ours, reference, inputs)


def test_opcheck_and_compile(device, unguarded, backend):
    v = make((3,), *size_of(backend, (5, 7), (8, 16)), size_of(backend, torch.float32, torch.float16), device)
    arguments = [value.requires_grad_() for value in v.values()]
    for op in (torch.ops.megakern.linear_swiglu, torch.ops.megakern.linear_swiglu_open):
        library.opcheck(op.default, (*arguments, True, backend))
    compiled = torch.compile(partial(mk.linear_swiglu, backend=backend), fullgraph=True, backend="aot_eager")
    assert_gradients_close(compiled, linear_swiglu_reference, v)


@pytest.mark.parametrize("kind", ["gelu_tanh", "swiglu"])
def test_two_layers_in_one_graph(kind, device, unguarded, backend):
    """linear_activated and linear_after, whose backward passes share the derivative: opcheck, and compiled as eager."""
    K, N, C = size_of(backend, (7, 5, 3), (16, 24, 8))
    v = make((3,), N, K, torch.float16, device)
    x, *weights = (value.requires_grad_() for value in v.values())
    after = draw(C, N, dtype=torch.float16, device=device, seed=5, scale=N**-0.5).requires_grad_()
    gate, up, gate_bias, up_bias = weights
    if kind == "gelu_tanh":
        library.opcheck(torch.ops.megakern.linear_activated.default, (x, gate, gate_bias, kind, backend))

    def layers(x, gate, up, gate_bias, up_bias, after):
        pairs = [(gate, gate_bias), (up, up_bias)][: 1 + (kind == "swiglu")]
        with mk.use_backend(backend):
            return linear_after(linear_activated(x, pairs, kind), after)

    results = []
    for function in (layers, torch.compile(layers, fullgraph=True, backend="aot_eager")):
        y = function(x, gate, up, gate_bias, up_bias, after)
        wanted = [x, gate, gate_bias, after] + [up, up_bias] * (kind == "swiglu")
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), wanted)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# --- the tile shapes of csrc/linear.cu ---


@cxx
@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.gated], ids=str)
def test_every_tile_shape_gated(tile, device, backend):
    """More tiles than blocks, tiles that stick out; both pre-activations as silu sees them, to the bit."""
    for M, N, K in [(tile.rows * 2 + 9, tile.cols + 24, 136), (8, 8, 8)]:
        a, gate, up = (
            draw(*s, dtype=torch.bfloat16, device=device, seed=i, scale=s[-1] ** -0.25)
            for i, s in enumerate([(M, K), (N, K), (N, K)])
        )
        biases = draw(2, N, device=device, seed=4)
        pres = [torch.full((2, M, N), float("nan"), dtype=torch.bfloat16, device=device) for _ in range(2)]
        more = {"b_up": up, "bias": biases[0], "bias_up": biases[1]}
        outs = [multiply(GATED, a, gate, tile, pre=pre[0], pre_up=pre[1], **more) for pre in pres]
        lean = multiply(GATED, a, gate, tile, **more)
        wide = [a.double() @ w.double().t() + b.double() for w, b in zip((gate, up), biases, strict=True)]
        for kept, reference in zip(pres[0], wide, strict=True):
            assert_close_to_ref(kept, reference, reference.bfloat16())
        value = F.silu(wide[0]) * wide[1]
        narrow = [x.bfloat16() for x in wide]
        assert_close_to_ref(outs[0], value, F.silu(narrow[0]) * narrow[1])
        assert_close_to_ref(lean, value, F.silu(narrow[0]) * narrow[1])
        assert torch.equal(*outs) and torch.equal(*pres)


@cxx
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("tile", COMPILED, ids=str)
def test_every_tile_shape_with_a_gradient(tile, kind, device, backend):
    M, N, K = tile.rows * 2 + 9, tile.cols + 24, 136
    dy, weight = (draw(*s, dtype=torch.bfloat16, device=device, seed=i) for i, s in enumerate([(M, K), (N, K)]))
    pre, up = saved(kind, M, N, torch.bfloat16, device)
    more = {"saved": pre, "activation": kind} if up is None else {"saved": pre, "saved_up": up}
    dups = torch.full((2, M, N), float("nan"), dtype=torch.bfloat16, device=device)
    found = [multiply(NN, dy, weight, tile, out_up=None if up is None else dup, **more) for dup in dups]
    arguments = [dy, weight.t(), pre, up]
    wide = gradient_reference(*(None if x is None else x.double() for x in arguments), kind)
    same = gradient_reference(*arguments, kind)
    assert_close_to_ref(found[0], wide[0], same[0])
    assert torch.equal(*found)
    if up is not None:
        assert_close_to_ref(dups[0], wide[1], same[1])
        assert torch.equal(*dups)


@cxx
def test_explain_names_the_gated_product(device, backend):
    x, weight = (torch.empty(size, 64, dtype=torch.bfloat16, device=device) for size in (16, 4096))
    told = str(mk.explain("linear_swiglu", x, weight, weight, backend=backend))
    assert "silu(gate) * up in their epilogue, in tiles of 64 x 128" in told
