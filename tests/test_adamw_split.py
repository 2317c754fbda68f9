"""Masters of bf16 parameters in mk.AdamW: splitting is exact for every bit pattern, and trains as fp32 does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import library
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import megakern as mk
from megakern.kernels.torch import adamw as kernel
from megakern.kernels.torch.adamw import join_master, split_master

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")

# Several blocks for the larger shapes. A multiple of the longest vector, as the real one: the fused kernel rounds the
# last few elements of a call, which fill no vector, in another way.
BLOCK = 64
SHAPES = [(1,), (1, 64), (7, 13), (40, 9), (0, 4)]
OPTIONS = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}

# High halves: zeros, subnormals, the smallest normal, around one, the largest finite, infinity, NaN; both signs.
SPECIAL = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF]
HIGHS = sorted({*SPECIAL, *(h | 0x8000 for h in SPECIAL), *range(5, 1 << 16, 4099)})


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", BLOCK)


def from_bits(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def to_bits(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().numpy().view(np.uint32)


@pytest.fixture(scope="module")
def every_low_half() -> np.ndarray:
    """All 2^16 low halves below each of HIGHS."""
    return (np.array(HIGHS, dtype=np.uint32)[:, None] << 16 | np.arange(1 << 16, dtype=np.uint32)).ravel()


def test_splitting_loses_no_bit(every_low_half):
    narrow, low = split_master(from_bits(every_low_half))
    assert narrow.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert np.array_equal(to_bits(join_master(narrow, low)), every_low_half)


def test_joining_loses_no_pair():
    """The other way round: each pair of halves is the split of what it joins to."""
    for high in HIGHS:
        narrow = torch.from_numpy(np.full(1 << 16, high, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)
        low = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
        again, same = split_master(join_master(narrow, low))
        assert torch.equal(again.view(torch.int16), narrow.view(torch.int16)) and torch.equal(same, low), hex(high)


def test_the_parameter_is_the_nearest_bf16(every_low_half):
    """PyTorch's cast, which rounds to nearest even, everywhere but at ties: there the one further from zero."""
    values = from_bits(every_low_half)
    known = ~values.isnan()
    narrow, _ = split_master(values)
    torch_cast = values.bfloat16()
    ties = torch.from_numpy((every_low_half & 0xFFFF) == 0x8000)
    assert torch.equal(narrow[known & ~ties].view(torch.int16), torch_cast[known & ~ties].view(torch.int16))
    away = torch.from_numpy(((every_low_half >> 16) + 1).astype(np.uint16).view(np.int16))[known & ties]
    assert torch.equal(narrow[known & ties].view(torch.int16), away)
    finite = known & ties & narrow.isfinite() & torch_cast.isfinite()
    wide = values[finite].double()
    assert torch.equal((narrow[finite].double() - wide).abs(), (torch_cast[finite].double() - wide).abs())


def test_a_nan_or_infinite_master_is_kept_and_seen():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    narrow, low = split_master(values)
    assert narrow.isnan().tolist() == [True, False, False, False]
    assert narrow.isinf().tolist() == [False, True, True, False]
    assert np.array_equal(to_bits(join_master(narrow, low)), to_bits(values))


def draw(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]


def parameters(dtype=torch.bfloat16):
    return [torch.nn.Parameter(value) for value in draw(0, dtype)]


def set_gradients(params, step, dtype):
    for param, gradient in zip(params, draw(100 + step, dtype), strict=True):
        param.grad_dtype = dtype
        param.grad = gradient


def masters(optimizer, params) -> list[torch.Tensor]:
    """The fp32 master of each parameter, however it is kept."""
    states = [optimizer.state[param] for param in params]
    if optimizer.master == "fp32":
        return [state["master"] for state in states]
    return [join_master(param.detach(), state["low"]) for param, state in zip(params, states, strict=True)]


def run(master, gradient, state_dtype=torch.float32, steps=range(200), grad_scale=None, params=None, optimizer=None):
    params = params or parameters()
    optimizer = optimizer or mk.AdamW(params, **OPTIONS, master=master, state_dtype=state_dtype)
    for step in steps:
        set_gradients(params, step, gradient)
        optimizer.step(grad_scale=grad_scale)
    return params, optimizer


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_scale", [None, torch.tensor(0.3)])
def test_200_steps_are_those_of_fp32_parameters(gradient, state_dtype, grad_scale):
    """Each master against fp32 parameters, which are the master themselves, given the same gradients."""
    wide = [torch.nn.Parameter(value.float()) for value in draw(0, torch.bfloat16)]
    reference = mk.AdamW(wide, **OPTIONS, state_dtype=state_dtype)
    for step in range(200):
        for param, grad in zip(wide, draw(100 + step, gradient), strict=True):
            param.grad = grad.float()
        reference.step(grad_scale=grad_scale)
    for master in ("fp32", "split"):
        params, optimizer = run(master, gradient, state_dtype, grad_scale=grad_scale)
        for param, kept, expected in zip(params, masters(optimizer, params), wide, strict=True):
            assert torch.equal(kept, expected), master
            assert torch.equal(param, split_master(expected.detach())[0])
            assert len(optimizer.state[param]) == 4
    assert not torch.equal(wide[3].bfloat16(), draw(0, torch.bfloat16)[3])


def test_small_updates_add_up():
    """1000 updates, each far below half a unit of the bf16 weight: without the low half it would never move."""
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = mk.AdamW([param], lr=1e-5, weight_decay=0.0, master="split")
    for _ in range(1000):
        param.grad = torch.ones(3, dtype=torch.bfloat16)
        optimizer.step()
    torch.testing.assert_close(masters(optimizer, [param])[0], torch.full((3,), 0.99), rtol=1e-4, atol=0)


def test_strided_parameter():
    values = torch.randn(6, 9).bfloat16()
    results = []
    for start in (values.t(), values.t().contiguous()):
        param = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
        optimizer = mk.AdamW([param], **OPTIONS, master="split")
        for step in range(4):
            param.grad = torch.full((9, 6), 0.1 * step, dtype=torch.bfloat16)
            optimizer.step()
        results.append(masters(optimizer, [param])[0])
    assert torch.equal(*results)


def test_low_is_two_bytes_and_16_bit_integers():
    params, optimizer = run("split", torch.float32, torch.bfloat16, steps=range(1))
    bytes_a_parameter = sum(
        tensor.untyped_storage().nbytes()
        for param in params
        for tensor in (param, *(s for n, s in optimizer.state[param].items() if n != "step"))
    ) / sum(param.numel() for param in params)
    assert bytes_a_parameter == 2 + 2 + 2 + 2
    assert optimizer.state[params[1]]["low"].dtype == torch.int16


@pytest.mark.parametrize("saved_as", ["fp32", "split"])
@pytest.mark.parametrize("loaded_as", ["fp32", "split"])
def test_state_dict_goes_on_bit_for_bit_also_with_the_other_master(saved_as, loaded_as):
    params, optimizer = run(saved_as, torch.float32, steps=range(5))
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = mk.AdamW(copies, lr=1.0, master=loaded_as)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(saved_as, torch.float32, steps=range(5, 10), params=params, optimizer=optimizer)
    run(loaded_as, torch.float32, steps=range(5, 10), params=copies, optimizer=other)
    wanted = {"step", "exp_avg", "exp_avg_sq", "master" if loaded_as == "fp32" else "low"}
    for a, b in zip(masters(optimizer, params), masters(other, copies), strict=True):
        assert torch.equal(a, b)
    assert all(set(other.state[param]) == wanted for param in copies)


def test_a_whole_master_of_other_parameters_is_refused():
    _, optimizer = run("fp32", torch.float32, steps=range(2))
    fresh = parameters()
    with pytest.raises(
        ValueError, match=r"not the rounding of the fp32 master .* load the model's own parameters first"
    ):
        mk.AdamW(fresh, master="split").load_state_dict(optimizer.state_dict())


def test_loads_the_state_of_torch_optim():
    theirs = parameters()
    other = torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(3):
        set_gradients(theirs, step, torch.bfloat16)
        other.step()
    ours = [torch.nn.Parameter(param.detach().clone()) for param in theirs]
    optimizer = mk.AdamW(ours, master="split")
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    run("split", torch.bfloat16, steps=[3], params=ours, optimizer=optimizer)
    for param, their, gradient in zip(ours, theirs, draw(103, torch.bfloat16), strict=True):
        before = {name: value.float() for name, value in other.state[their].items()}
        expected, *_ = mk.ops.adamw.adamw_reference(
            their.detach().double(),
            gradient.double(),
            before["exp_avg"].double(),
            before["exp_avg_sq"].double(),
            4,
            **OPTIONS,
        )
        torch.testing.assert_close(masters(optimizer, [param])[0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_set_master_starts_from_exact_values(master):
    values, params = draw(7), parameters()
    optimizer = mk.AdamW(params, **OPTIONS, master=master)
    for param, value in zip(params, values, strict=True):
        optimizer.set_master(param, value)
    for param, value, kept in zip(params, values, masters(optimizer, params), strict=True):
        assert torch.equal(kept, value) and torch.equal(param, value.bfloat16())


def test_deepcopy_keeps_the_master():
    assert copy.deepcopy(mk.AdamW(parameters(), master="split")).master == "split"


def gathered(low: DTensor) -> torch.Tensor:
    """gloo has no int16."""
    return low.to(torch.int32).full_tensor().to(torch.int16)


def run_dtensors(master):
    kernel.BLOCK = BLOCK
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    placements = [Replicate(), Shard(0), Shard(1), Shard(0), Shard(0)]

    def spread(values):
        return [distribute_tensor(v, mesh, [p]) for v, p in zip(values, placements, strict=True)]

    params = [torch.nn.Parameter(value) for value in spread(draw(0, torch.bfloat16))]
    optimizer = mk.AdamW(params, **OPTIONS, master=master)
    for param, value in zip(params, spread(draw(7)), strict=True):
        optimizer.set_master(param, value.to_local())
    for step in range(3):
        for param, gradient in zip(params, spread(draw(100 + step)), strict=True):
            param.grad_dtype = torch.float32
            param.grad = gradient
        optimizer.step()
    low = [optimizer.state[param].get("low") for param in params]
    if master == "split":
        assert all(isinstance(t, DTensor) and t.placements == p.placements for t, p in zip(low, params, strict=True))
        return [join_master(param.full_tensor().detach(), gathered(t)) for param, t in zip(params, low, strict=True)]
    return [optimizer.state[param]["master"].full_tensor() for param in params]


def test_dtensor_shards_are_updated_as_the_whole(ranks):
    params = parameters()
    optimizer = mk.AdamW(params, **OPTIONS, master="split")
    for param, value in zip(params, draw(7), strict=True):
        optimizer.set_master(param, value)
    run("split", torch.float32, steps=range(3), params=params, optimizer=optimizer)
    for master in ("fp32", "split"):
        for values in ranks.run(run_dtensors, 2, master):
            for value, whole in zip(values, masters(optimizer, params), strict=True):
                torch.testing.assert_close(value, whole, rtol=1e-6, atol=1e-7)


def test_opcheck():
    params = [value.bfloat16() for value in draw(0)]
    moments = [torch.zeros_like(p).float() for p in params], [torch.zeros_like(p).float() for p in params]
    low = [torch.full(p.shape, -3, dtype=torch.int16) for p in params]
    options = (False, 1, 1e-3, 0.9, 0.95, 1e-8, 0.1, "torch")
    library.opcheck(torch.ops.megakern.adamw.default, (params, draw(1), *moments, low, None, *options))


def test_bad_masters_are_named():
    with pytest.raises(ValueError, match="master must be one of fp32, split, got 'half'"):
        mk.AdamW(parameters(), master="half")
    with pytest.raises(TypeError, match='float16 is not the upper half of float32; use master="fp32"'):
        mk.AdamW(parameters(torch.float16), master="split")
    params = parameters()
    optimizer = mk.AdamW(params, master="split")
    with pytest.raises(TypeError, match=r"set_master takes fp32 for a bf16 or fp16 param, got torch\.bfloat16"):
        optimizer.set_master(params[1], params[1].detach())
    with pytest.raises(ValueError, match=r"must have the shape of its param, .*\[1, 64\].*, got .*\[64\]"):
        optimizer.set_master(params[1], torch.zeros(64))
