"""rope: against complex numbers, against the published models' own code, gradients. No device needed."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import library

import megakern as mk
import megakern.layers.attention as attention_layer
from megakern.ops.checks import repeats_an_element, share_an_element
from megakern.ops.rope import rope_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tables(Tmax, d, dtype=torch.float32):
    angles = torch.arange(Tmax, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(d, dtype=torch.float64) / d)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def make(B, T, H, Hkv, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(B, T, H, D, generator=g).to(dtype),
        "k": torch.randn(B, T, Hkv, D, generator=g).to(dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
# Smallest, one row, primes, partial rotary with an even and an odd tail, empty batch, no token.
@pytest.mark.parametrize(
    "shape, d",
    [
        ((1, 1, 1, 1, 2), 1),
        ((1, 1, 3, 1, 64), 32),
        ((2, 7, 5, 5, 22), 11),
        ((2, 5, 4, 2, 16), 3),
        ((2, 5, 3, 1, 17), 8),
        ((0, 3, 2, 1, 8), 4),
        ((2, 0, 2, 1, 8), 4),
    ],
)
def test_values_and_gradients(shape, d, interleaved, dtype):
    cos, sin = tables(shape[1] + 3, d)
    for positions in (None, torch.arange(shape[1]) + 2):
        more = {"positions": positions, "interleaved": interleaved}
        assert_gradients_close(
            lambda q, k, more=more: mk.rope(q, k, cos, sin, **more),
            lambda q, k, more=more: rope_reference(q, k, cos, sin, **more),
            make(*shape, dtype),
        )


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_a_complex_rotation_by_position_times_frequency(interleaved):
    v = make(2, 6, 3, 2, 10, torch.float64)
    positions = torch.tensor([[0, 5, 1, 9, 9, 2], [3, 1, 4, 1, 5, 9]], dtype=torch.int32)
    frequency = 10000.0 ** (-torch.arange(5, dtype=torch.float64) / 5)
    turn = torch.polar(torch.ones(2, 6, 1, 5, dtype=torch.float64), positions[..., None, None] * frequency)
    got = mk.rope(
        **v,
        **dict(zip(("cos", "sin"), tables(10, 5, torch.float64), strict=True)),
        positions=positions,
        interleaved=interleaved,
    )
    for x, y in zip(v.values(), got, strict=True):
        if interleaved:
            expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (5, 2))) * turn).flatten(-2)
        else:
            z = torch.complex(x[..., :5], x[..., 5:]) * turn
            expected = torch.cat([z.real, z.imag], -1)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_matches_the_code_of_llama_and_gptj_in_transformers():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    v = make(2, 9, 4, 2, 16, torch.float32)
    cos, sin = tables(9, 8)
    by_head = [x.transpose(1, 2) for x in v.values()]
    theirs = llama(*by_head, torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None])
    for ours, their in zip(mk.rope(**v, cos=cos, sin=sin), theirs, strict=True):
        torch.testing.assert_close(ours, their.transpose(1, 2), rtol=1e-5, atol=1e-6)
    for ours, x in zip(mk.rope(**v, cos=cos, sin=sin, interleaved=True), v.values(), strict=True):
        torch.testing.assert_close(ours, gptj(x, sin[None], cos[None]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset, row", [(0, 48), (1, 48), (0, 49)])
def test_views_of_a_fused_qkv(interleaved, offset, row):
    """Strides that are not those of a contiguous tensor; an odd offset or stride does not fit complex numbers."""
    qkv = torch.randn(3 * 5 * 49).as_strided((3, 5, 6, 8), (5 * row, row, 8, 1), offset)
    inputs = {"q": qkv[:, :, :4], "k": qkv[:, :, 4:5]}
    cos, sin = tables(5, 4)
    wide = rope_reference(*(x.double() for x in inputs.values()), cos, sin, interleaved=interleaved)
    same = rope_reference(*inputs.values(), cos, sin, interleaved=interleaved)
    for y, ref, base in zip(mk.rope(**inputs, cos=cos, sin=sin, interleaved=interleaved), wide, same, strict=True):
        assert_close_to_ref(y, ref, base)
        assert y.is_contiguous()


def test_reference_passes_gradcheck():
    v = {name: x.requires_grad_() for name, x in make(1, 3, 2, 1, 7, torch.float64).items()}
    cos, sin = tables(3, 2, torch.float64)
    for interleaved in (False, True):
        torch.autograd.gradcheck(
            lambda q, k, i=interleaved: rope_reference(q, k, cos, sin, interleaved=i), tuple(v.values())
        )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [None, torch.tensor([[2, 0, 1], [1, 1, 1]])])
def test_opcheck(interleaved, positions):
    v = make(2, 3, 2, 1, 6, torch.float32)
    arguments = (
        v["q"].requires_grad_(),
        v["k"].requires_grad_(),
        *tables(3, 2),
        positions,
        interleaved,
        False,
        "torch",
    )
    library.opcheck(torch.ops.megakern.rope.default, arguments)


def test_compiles_in_one_graph():
    cos, sin = tables(8, 4)

    def both(q, k):
        q, k = mk.rope(q, k, cos, sin, positions=torch.arange(3, 8))
        return mk.rope(q, k, cos, sin, interleaved=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_gradients_close(compiled, both, make(2, 5, 2, 1, 8, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape, d", [((2, 7, 5, 5, 22), 11), ((2, 5, 3, 1, 17), 6), ((2, 0, 2, 1, 8), 4)])
def test_in_place_values_and_gradients(shape, d, interleaved, dtype):
    cos, sin = tables(shape[1] + 3, d)
    for positions in (None, torch.arange(shape[1]) + 2):
        more = {"positions": positions, "interleaved": interleaved}

        def turned(q, k, more=more):
            q, k = q.clone(), k.clone()
            got = mk.rope(q, k, cos, sin, in_place=True, **more)
            assert got[0] is q and got[1] is k
            return got

        assert_gradients_close(turned, lambda q, k, m=more: rope_reference(q, k, cos, sin, **m), make(*shape, dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset, row", [(0, 48), (1, 48), (0, 49)])
def test_in_place_in_a_fused_qkv(interleaved, offset, row):
    """Only q and k of it change; its gradient is that of the functional op, and flows through all three."""
    field = torch.randn(3 * 5 * 49 + 1)
    cos, sin = tables(5, 3)

    def run(in_place):
        leaf = field.clone().requires_grad_()
        qkv = (leaf * 1).as_strided((3, 5, 6, 8), (5 * row, row, 8, 1), offset)
        q, k, v = qkv[:, :, :4], qkv[:, :, 4:5], qkv[:, :, 5:]
        q, k = mk.rope(q, k, cos, sin, interleaved=interleaved, in_place=in_place)
        ((q * q.detach().cos()).sum() + (k * k.detach().exp()).sum() + v.sum()).backward()
        return q, k, v, leaf.grad

    for ours, functional in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, functional)


def test_in_place_only_k_needs_a_gradient():
    v, (cos, sin) = make(1, 3, 2, 1, 8, torch.float32), tables(3, 4)
    leaf = v["k"].clone().requires_grad_()
    q, k = mk.rope(v["q"].clone(), leaf * 1, cos, sin, in_place=True)
    (gradient,) = torch.autograd.grad(k.sum(), leaf)
    leaf = v["k"].clone().requires_grad_()
    expected = mk.rope(v["q"], leaf, cos, sin)
    assert torch.equal(gradient, torch.autograd.grad(expected[1].sum(), leaf)[0])
    assert torch.equal(q, expected[0]) and not q.requires_grad


def test_in_place_is_refused_as_autograd_does():
    v, (cos, sin) = make(1, 3, 2, 2, 8, torch.float32), tables(3, 4)
    leaf = v["q"].clone().requires_grad_()
    for q, message in [
        (leaf, "a leaf Variable that requires grad"),
        (leaf[:, :, :1], "a view of a leaf Variable that requires grad"),
        ((leaf * 1).unbind(2)[0].unsqueeze(2), "is a view and is being modified inplace"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            mk.rope(q, v["k"], cos, sin, in_place=True)
    assert torch.equal(leaf, v["q"]) and torch.equal(v["k"], make(1, 3, 2, 2, 8, torch.float32)["k"])
    with torch.no_grad():
        assert mk.rope(leaf, v["k"].clone(), cos, sin, in_place=True)[0] is leaf
    assert torch.equal(leaf, mk.rope(**v, cos=cos, sin=sin)[0])


@pytest.mark.parametrize("recorded", [True, False])
def test_in_place_is_seen_by_who_saved_the_tensor(recorded):
    v, (cos, sin) = make(1, 3, 2, 2, 8, torch.float32), tables(3, 4)
    q = v["q"].requires_grad_().exp()  # saves its output
    with torch.set_grad_enabled(recorded):
        mk.rope(q, v["k"], cos, sin, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_in_place_refuses_tensors_that_overlap():
    cos, sin = tables(3, 2)
    qkv = torch.randn(2, 3, 6, 4)
    before = qkv.clone()
    for q, k in [(qkv, qkv), (qkv[:, :, :4], qkv[:, :, 3:]), (qkv[:, :, ::2], qkv[:, :, 1:5])]:
        with pytest.raises(ValueError, match="q and k, which must not overlap in memory"):
            mk.rope(q, k, cos, sin, in_place=True)
    spread = qkv[:, :, :1].expand(2, 3, 4, 4)
    for name, q, k in [("q", spread, qkv.clone()), ("k", qkv.clone(), spread)]:
        with pytest.raises(ValueError, match=rf"writes over {name}, each element .* strides \(72, 24, 0, 1\)"):
            mk.rope(q, k, cos, sin, in_place=True)
    assert torch.equal(qkv, before)


def test_overlap_is_exact():
    """Against the sets of all places, for strides of every kind."""
    draw = random.Random(0)
    field = torch.zeros(400)
    seen = {True: 0, False: 0}

    def view():
        shape, strides, step = [draw.randint(1, 3) for _ in range(3)], [], draw.choice([1, 1, 2])
        for size in shape:
            strides.append(draw.choice([step, step, draw.randint(0, 12)]))
            step = step * size + draw.choice([0, 0, 1])
        return field.as_strided(shape, strides, draw.randint(0, 30))

    def places(x):
        return torch.arange(400).as_strided(x.shape, x.stride(), x.storage_offset()).flatten().tolist()

    for _ in range(800):
        x, y = view(), view()
        if draw.random() < 0.5:
            y = field.as_strided(x.shape, x.stride(), draw.randint(0, 30))
        repeats, share = len(set(places(x))) < x.numel(), not set(places(x)).isdisjoint(places(y))
        assert repeats_an_element(x) == repeats, x.stride()
        assert share_an_element(x, y) == share, (x.stride(), x.storage_offset(), y.stride(), y.storage_offset())
        seen[share] += 1
    assert min(seen.values()) > 150, seen


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_opcheck(interleaved):
    v, (cos, sin) = make(2, 3, 2, 1, 6, torch.float32), tables(3, 2)
    qkv = torch.randn(2, 3, 5, 6)
    for q, k in [tuple(v.values()), (qkv[:, :, :2], qkv[:, :, 2:4])]:
        arguments = (q, k, cos, sin, torch.tensor([[2, 0, 1], [1, 1, 1]]), interleaved, False, "torch")
        library.opcheck(torch.ops.megakern.rope_.default, arguments)


def test_in_place_compiles_in_one_graph():
    cos, sin = tables(8, 4)

    def both(qkv, in_place):
        qkv = qkv * 2
        q, k, v = qkv[:, :, :2], qkv[:, :, 2:3], qkv[:, :, 3:]
        q, k = mk.rope(q, k, cos, sin, positions=torch.arange(3, 8), in_place=in_place)
        q, k = mk.rope(q, k, cos, sin, interleaved=True, in_place=in_place)
        return q, k, v

    compiled = torch.compile(partial(both, in_place=True), fullgraph=True, backend="aot_eager")
    inputs = {"qkv": torch.randn(2, 5, 4, 8)}
    assert_gradients_close(compiled, partial(both, in_place=False), inputs)
    q, k = inputs["qkv"][:, :, :2].clone(), inputs["qkv"][:, :, 2:3].clone()
    expected = mk.rope(q, k, cos, sin)
    given = torch.compile(lambda q, k: mk.rope(q, k, cos, sin, in_place=True), fullgraph=True, backend="aot_eager")
    given(q, k)  # what the caller gave is changed
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_attention_without_gradients_rotates_what_its_norms_made(monkeypatch):
    """In place, with the same result, and what the projection gave to others is as it was."""
    torch.manual_seed(0)
    layer, x = mk.ParallelAttention(32, 4, kv_heads=2, qk_norm=True), torch.randn(2, 6, 32)
    given, asked = [], []
    layer.qkv.register_forward_hook(lambda module, inputs, output: given.append(output))
    monkeypatch.setattr(
        attention_layer,
        "apply_rope",
        lambda *a, in_place, **o: asked.append(in_place) or mk.rope(*a, in_place=in_place, **o),
    )
    recorded = layer(x, rope=tables(6, 4))
    with torch.no_grad():
        plain = layer(x, rope=tables(6, 4))
    assert asked == [False, True]
    assert torch.equal(plain, recorded) and torch.equal(*given)


def test_repeats_are_bit_identical():
    v = make(3, 33, 4, 2, 64, torch.bfloat16)
    first, second = (mk.rope(**v, **dict(zip(("cos", "sin"), tables(33, 32), strict=True))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.ones(3, 2, 8)}, ValueError, r"q must have shape \(B, T, H, D\) with D > 0, got \(3, 2, 8\)"),
        ({"q": torch.ones(2, 3, 4, 8).int()}, TypeError, "q must be float16, bfloat16, float32 or float64"),
        ({"k": torch.ones(2, 3, 2, 8).half()}, TypeError, "k must have the dtype of q"),
        ({"k": torch.ones(2, 4, 2, 8)}, ValueError, r"k must have shape \(B, T, Hkv, D\) = \(2, 3, 2, 8\), got \(2, 4"),
        ({"cos": torch.ones(3, 5)}, ValueError, r"cos must have shape \(Tmax, d\) with 0 < 2 d <= D = 8, got \(3, 5\)"),
        ({"sin": torch.ones(3)}, ValueError, r"sin must have shape \(Tmax, d\)"),
        ({"sin": torch.ones(4, 4)}, ValueError, r"sin must have shape of cos = \(3, 4\), got \(4, 4\)"),
        ({"cos": torch.ones(3, 4).half()}, TypeError, "cos must be float32 or float64, got torch.float16"),
        ({"cos": torch.ones(3, 4, requires_grad=True)}, ValueError, "cos must not require a gradient"),
        ({"sin": torch.ones(3, 4, device="meta")}, ValueError, "sin must be on the device of q"),
        ({"cos": torch.ones(2, 4), "sin": torch.ones(2, 4)}, ValueError, "have 2 positions, too few for T = 3"),
        ({"positions": torch.ones(3)}, TypeError, "positions must be int32 or int64, got torch.float32"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, ValueError, r"positions must have shape \(3,\) or \(2, 3\)"),
        ({"positions": torch.tensor([0, 3, 1])}, ValueError, r"positions must lie in 0 .. 2, .* got 0 .. 3"),
        ({"positions": torch.tensor([0, -1, 1])}, ValueError, r"positions must lie in 0 .. 2, .* got -1 .. 1"),
        (
            {"positions": torch.zeros(3, dtype=torch.int64, device="meta")},
            ValueError,
            "positions must be on the device",
        ),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    v = make(2, 3, 4, 2, 8, torch.float32)
    arguments = {**v, **dict(zip(("cos", "sin"), tables(3, 4), strict=True)), **change}
    with pytest.raises(error, match=message):
        mk.rope(**arguments)
