"""The rope of every compiled backend against float64: both conventions, partial rotation, positions, strides."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import library

import megakern as mk
from megakern.kernels.cuda import module
from megakern.ops.dispatch import launcher
from megakern.ops.rope import rope_reference
from tests.closeness import assert_gradients_close
from tests.kernels.inputs import DTYPES, draw, fenced

OP = "rope"
TMAX = 11


def make(B, T, H, Hkv, D, d, device, dtype=torch.float32, positions=None):
    angles = torch.outer(torch.arange(TMAX, dtype=torch.float64), torch.logspace(0, -3, d, dtype=torch.float64))
    return {
        "q": draw(B, T, H, D, dtype=dtype, device=device),
        "k": draw(B, T, Hkv, D, dtype=dtype, device=device, seed=1),
        "positions": None if positions is None else torch.tensor(positions, device=device),
    }, {"cos": angles.cos().float().to(device), "sin": angles.sin().float().to(device)}


def check(inputs, tables, interleaved, backend):
    shared = {**tables, "interleaved": interleaved}
    assert_gradients_close(partial(mk.rope, backend=backend, **shared), partial(rope_reference, **shared), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "B, T, H, Hkv, D, d", [(1, 1, 1, 1, 2, 1), (2, 5, 3, 1, 16, 8), (1, 3, 4, 4, 17, 6), (2, 3, 5, 2, 80, 16)]
)
def test_outputs_and_gradients(B, T, H, Hkv, D, d, interleaved, dtype, device, backend):
    check(*make(B, T, H, Hkv, D, d, device, dtype), interleaved, backend)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [[7, 0, 10], [[1, 2, 3], [10, 9, 8]]])
def test_positions(positions, interleaved, device, backend):
    check(*make(2, 3, 2, 1, 8, 4, device, positions=positions), interleaved, backend)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_both_dtypes_with_strides(dtype, device, backend):
    inputs, tables = make(2, 3, 2, 1, 8, 4, device, positions=[[1, 5, 2, 5, 3, 5], [10, 5, 9, 5, 8, 5]])
    check(inputs | {"positions": inputs["positions"].to(dtype)[:, ::2]}, tables, False, backend)


def test_more_heads_than_one_tile_holds(device, backend):
    check(*make(1, 2, 33, 9, 64, 32, device), False, backend)
    check(*make(1, 2, 33, 9, 64, 32, device), True, backend)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strided_views_and_nan_around_them(interleaved, device, backend):
    inputs, tables = make(2, 3, 3, 3, 10, 4, device)
    expected = mk.rope(inputs["q"], inputs["k"], **tables, interleaved=interleaved, backend=backend)
    q, k = (fenced(x) for x in (inputs["q"], inputs["k"]))
    tables = {name: fenced(table) for name, table in tables.items()}
    for ours, plain in zip(mk.rope(q, k, **tables, interleaved=interleaved, backend=backend), expected, strict=True):
        assert torch.equal(ours, plain) and ours.is_contiguous()
    q = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    k = inputs["k"].transpose(-1, -2).contiguous().transpose(-1, -2)
    for ours, plain in zip(mk.rope(q, k, **tables, interleaved=interleaved, backend=backend), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape, positions", [((2, 5, 3, 1, 16, 8), None), ((1, 3, 4, 4, 17, 6), [7, 0, 10]), ((2, 2, 33, 9, 80, 32), None)]
)
def test_in_place(shape, positions, interleaved, dtype, device, backend):
    """As out of place, to the bit; outputs and gradients of both are close to float64."""
    inputs, tables = make(*shape, device, dtype, positions)
    shared = {**tables, "interleaved": interleaved}

    def turned(q, k, positions):
        return mk.rope(q.clone(), k.clone(), positions=positions, in_place=True, backend=backend, **shared)

    assert_gradients_close(turned, partial(rope_reference, **shared), inputs)
    expected = mk.rope(**inputs, **shared, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(turned(**inputs), expected, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("d, D", [(8, 16), (3, 16), (4, 9)])
def test_in_place_writes_nothing_else(d, D, interleaved, device, backend):
    """Views of one qkv in both orders, with NaN around all of it; and a view without neighbouring elements."""
    inputs, tables = make(2, 3, 3, 3, D, d, device)
    expected = mk.rope(inputs["q"], inputs["k"], **tables, interleaved=interleaved, backend=backend)
    for heads in ((0, 3, 6), (0, 1, 2)):  # q .. q k .. k v .. v, or q k v of each head in turn
        step = 1 if heads[1] == 3 else 3
        where = [slice(first, first + 3 * step, step) for first in heads[:2]]
        qkv = draw(2, 3, 9, D, device=device, seed=2)
        for at, x in zip(where, inputs.values(), strict=False):
            qkv[:, :, at] = x
        field = fenced(qkv)
        whole = field.untyped_storage()
        around = torch.empty(0, dtype=field.dtype, device=device).set_(whole).clone()
        mk.rope(*(field[:, :, at] for at in where), **tables, interleaved=interleaved, in_place=True, backend=backend)
        for at, x in zip(where, expected, strict=True):
            assert torch.equal(field[:, :, at], x)
            field[:, :, at] = qkv[:, :, at]  # then nothing has changed
        assert torch.equal(
            torch.empty(0, dtype=field.dtype, device=device).set_(whole).nan_to_num(7), around.nan_to_num(7)
        )
    q = inputs["q"].transpose(-1, -2).contiguous().transpose(-1, -2)
    mk.rope(q, inputs["k"], **tables, interleaved=interleaved, in_place=True, backend=backend)
    assert torch.equal(q, expected[0]) and torch.equal(inputs["k"], expected[1])


def test_a_position_outside_the_tables_is_nan(device, backend):
    inputs, tables = make(1, 3, 2, 1, 8, 4, device, positions=[0, TMAX, -1])
    rope = launcher(backend, "rope", "rope")  # the public function refuses it on a CPU
    q, _ = rope(inputs["q"], inputs["k"], *tables.values(), inputs["positions"], False, False)
    assert q[0, 0].isfinite().all() and q[0, 1:].isnan().all()


def test_opcheck_and_compile(device, backend, unguarded):
    inputs, tables = make(2, 3, 2, 1, 8, 3, device)
    arguments = (inputs["q"].requires_grad_(), inputs["k"].requires_grad_(), *tables.values(), None, True, False)
    library.opcheck(torch.ops.megakern.rope.default, (*arguments, backend))
    op = partial(mk.rope, **tables, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_gradients_close(
        compiled, partial(rope_reference, **tables), {k: v.detach() for k, v in inputs.items() if v is not None}
    )
    arguments = (inputs["q"].detach(), inputs["k"].detach(), *tables.values(), None, True, False, backend)
    library.opcheck(torch.ops.megakern.rope_.default, arguments)


@pytest.mark.only("simt")
def test_in_place_into_other_memory_is_refused(device, backend):
    q, k, other = (torch.zeros(1, 1, 2, 8) for _ in range(3))
    table = torch.zeros(1, 4)
    numbers = (0, 5, 1, 1, 1, 2, 2, 8, 4, 16, 16, 8, 16, 16, 8, 4, 4, 0, 0, False, False, True)
    for outputs in ((q, other), (other, k)):
        with pytest.raises(ValueError, match="in place q_out must be q, and k_out k"):
            tensors = (x.data_ptr() for x in (q, k, *outputs, table, table))
            module.call("rope", q, *tensors, 0, *numbers)
