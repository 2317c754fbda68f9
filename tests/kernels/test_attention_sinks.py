"""Attention with sinks, one more score of each head beside those of the keys, on every compiled backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import library

from megakern.kernels.triton import attention_configs as configs
from megakern.ops.attention import attention
from megakern.ops.attention_reference import attention_reference
from megakern.ops.paged_attention import paged_attention, paged_attention_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import draw
from tests.paging import paged

OP = "attention"
SINKS = torch.tensor([1.5, -2.0, 30.0, -40.0])  # some of the weight, little, nearly all and none


@pytest.fixture
def small_tiles(monkeypatch):
    """Of Triton: inputs of few rows cross the borders of blocks."""
    small = configs.Config("small", {"BM": 32, "BN": 16}, 4, 2)
    monkeypatch.setattr(configs, "attention", lambda role, *sizes: configs.Choice((small,)))


def make(B, T, S, H, Hkv, D, device, dtype=torch.float16):
    shapes = {"q": (B, T, H, D), "k": (B, S, Hkv, D), "v": (B, S, Hkv, D)}
    inputs = {name: draw(*shape, dtype=dtype, device=device, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return inputs | {"sinks": SINKS[:H].to(device, dtype)}


def check(inputs, backend, **options):
    def finite(function):
        def call(**v):
            out, lse = function(**v, **options, return_lse=True)
            return out, lse.masked_fill(lse == -torch.inf, -9.0)

        return call

    assert_gradients_close(finite(partial(attention, backend=backend)), finite(attention_reference), inputs)


# Rows that see nothing beside the sink, one row (the kernel of few rows), groups of heads, features.
@pytest.mark.parametrize("T, S, options", [
    (70, 70, {}), (70, 50, {}), (1, 60, {}), (65, 130, {"causal": False}),
    (40, 90, {"window": (20, 3), "causal": False}), (40, 40, {"softcap": 1.5, "scale": 0.7}),
    (40, 40, {"dropout_p": 0.3, "seed": 7, "dropout_offset": (5, 7)}),
])  # fmt: skip
def test_outputs_and_gradients(T, S, options, device, backend, small_tiles):
    B = 1 if S > T + 20 else 2  # the interpreter takes a time for each program
    check(make(B, T, S, 4, 2, 16, device), backend, **options)


def test_packed_with_slopes(device, backend, small_tiles):
    inputs = make(1, 79, 74, 4, 2, 16, device)
    packed = {name: x[0] if name != "sinks" else x for name, x in inputs.items()}
    both = tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in ((0, 40, 40, 41, 79), (0, 50, 53, 53, 74)))
    slopes = torch.tensor([0.5, 0.0, -0.1, 0.25], device=device)
    check(packed, backend, cu_seqlens=both, alibi_slopes=slopes)


def test_a_sink_of_minus_infinity_is_none(device, backend, small_tiles):
    inputs = make(1, 40, 30, 2, 2, 16, device)
    inputs["sinks"] = torch.full((2,), -torch.inf, device=device)
    out, lse = attention(**inputs, return_lse=True, backend=backend)
    del inputs["sinks"]
    for one, other in zip((out, lse), attention(**inputs, return_lse=True, backend=backend), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_pages(softcap, device, backend):
    q, k, v, sinks = make(3, 2, 70, 4, 2, 16, device).values()
    arguments = (q, *paged(k, v, [70, 33, 0], 16))
    options = {"sinks": sinks, "softcap": softcap, "return_lse": True}
    found = paged_attention(*arguments, backend=backend, **options)
    wide, same = (
        paged_attention_reference(*(x.to(d) if x.is_floating_point() else x for x in arguments), **options)
        for d in (torch.float64, torch.float16)
    )
    for ours, reference, narrow in zip(found, wide, same, strict=True):
        assert_close_to_ref(ours, reference.double(), narrow)
    assert torch.equal(found[1][2], sinks.float()[:, None].expand(4, 2)), "no key: the sink has all of the probability"


def test_opcheck_and_compile(device, backend, unguarded, small_tiles):
    inputs = make(1, 9, 9, 2, 1, 8, device)
    arguments = [x.requires_grad_() for x in inputs.values()]
    how = (None, None, None, [4, 0], 0.3, 2.0, 0.0, [0, 0, 0], True, backend)
    library.opcheck(torch.ops.megakern.attention_sinks.default, (*arguments, *how))
    op = partial(attention, window=(4, None), softcap=2.0, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    reference = partial(attention_reference, window=(4, None), softcap=2.0)
    assert_gradients_close(compiled, reference, {name: x.detach() for name, x in inputs.items()})
