"""The C++ attention for sm_90a against float64: masks, groups, ragged tiles. In the emulator, or on a GPU.

Each consumer owns 64 queries of a tile of 128, and keys come in tiles of 128.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import megakern as mk
from megakern.kernels.cuda import attention as launchers
from megakern.ops.attention import attention
from megakern.ops.attention_reference import attention_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import draw

OP = "attention"
pytestmark = pytest.mark.only("cuda", "simt")


def make(B, T, S, H, Hkv, D, dtype, device):
    shapes = {"q": (B, T, H, D), "k": (B, S, Hkv, D), "v": (B, S, Hkv, D)}
    return {name: draw(*shape, dtype=dtype, device=device, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def check(inputs, backend, **options):
    """out and lse; where a row sees no key both lse are -inf."""
    options["return_lse"] = True
    out, lse = attention(**inputs, backend=backend, **options)
    same, _ = attention_reference(**inputs, **options)
    wide, wide_lse = attention_reference(**{name: x.double() for name, x in inputs.items()}, **options)
    assert_close_to_ref(out, wide, same)
    assert torch.equal(lse.isinf(), wide_lse.isinf())
    seen = ~wide_lse.isinf()
    torch.testing.assert_close(lse[seen].double(), wide_lse[seen], rtol=1e-5, atol=1e-5)
    return out, lse


# One query, tiles of 64 and 128 and their neighbours, primes, T < S and T > S (rows that see nothing), several samples.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 64), (1, 128, 128, 1, 1, 128), (2, 7, 129, 4, 2, 64), (1, 130, 67, 2, 2, 64),
     (1, 113, 203, 3, 1, 128), (1, 257, 255, 2, 1, 64)],
)  # fmt: skip
def test_causal_and_full(shape, dtype, backend, device):
    check(make(*shape, dtype, device), backend)
    check(make(*shape, dtype, device), backend, causal=False)


@pytest.mark.parametrize("window", [(0, 0), (30, 10), (100, None), (None, 5), (300, 0)])
def test_windows(window, backend, device):
    check(make(1, 150, 290, 2, 1, 64, torch.bfloat16, device), backend, causal=False, window=window)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_scales(scale, backend, device):
    check(make(1, 70, 130, 1, 1, 64, torch.bfloat16, device), backend, scale=scale)


def test_heads_in_sections_of_any_size(backend, device, monkeypatch):
    inputs = make(2, 140, 140, 6, 3, 64, torch.bfloat16, device)
    whole = check(inputs, backend)
    monkeypatch.setattr(launchers, "KEYS_IN_CACHE", 1)  # one group of heads at a time
    for one, other in zip(whole, check(inputs, backend), strict=True):
        assert torch.equal(one, other)


@pytest.mark.only("simt")
@pytest.mark.parametrize("schedule", ["reverse", "random", "pct"])
def test_the_order_of_threads_does_not_matter(schedule, backend, device):
    from megakern import _simt

    inputs = make(1, 140, 300, 1, 1, 64, torch.bfloat16, device)
    first = check(inputs, backend)
    _simt.set_schedule(schedule)
    try:
        for one, other in zip(first, check(inputs, backend), strict=True):
            assert torch.equal(one, other)
    finally:
        _simt.set_schedule("forward")


def test_strided_views_and_nan_around_them(backend, device):
    """q, k, v out of one projection, as layers have them, with NaN in the columns between."""
    field = torch.full((2, 90, 5, 3 * 64 + 16), float("nan"), dtype=torch.bfloat16, device=device)
    views = [field[..., at : at + 64] for at in (0, 64, 128)]
    for i, view in enumerate(views):
        view.copy_(draw(*view.shape, dtype=torch.bfloat16, device=device, seed=i))
    q, k, v = views[0], views[1][:, :, :1], views[2][:, :, :1]
    plain = attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
    assert torch.equal(attention(q, k, v, backend=backend), plain)
    odd = torch.empty(2, 90, 5, 67, dtype=torch.bfloat16, device=device)[..., 1:65].copy_(q)
    assert torch.equal(attention(odd, k, v, backend=backend), plain)


def test_nan_in_keys_that_nobody_sees(backend, device):
    inputs = make(1, 50, 200, 1, 1, 64, torch.bfloat16, device)
    expected = check(inputs, backend, causal=False, window=(20, 0))
    inputs["k"][:, :100] = 1000.0  # finite: a masked product of NaN is NaN on every backend's v
    inputs["v"][:, :100] = 1000.0
    found = attention(**inputs, causal=False, window=(20, 0), return_lse=True, backend=backend)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_gradients_and_repeats(backend, device):
    inputs = make(1, 70, 90, 2, 1, 64, torch.bfloat16, device)
    assert_gradients_close(partial(attention, backend=backend), attention_reference, inputs)
    first, second = (attention(**inputs, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "options, D, reason",
    [({"softcap": 5.0}, 64, "has no softcap"), ({"dropout_p": 0.1, "seed": 1}, 64, "has no dropout"),
     ({}, 80, "for head dims 64 and 128, got 80")],
)  # fmt: skip
def test_what_it_refuses(options, D, reason, backend, device):
    inputs = make(1, 8, 8, 1, 1, D, torch.bfloat16, device)
    with pytest.raises(ValueError, match=reason):
        attention(**inputs, backend=backend, **options)
    assert reason in mk.explain("attention", **inputs, **options).reasons[backend]
