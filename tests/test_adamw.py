"""AdamW: one process, and DTensor parameters over two gloo ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import library
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import megakern as mk
from megakern.kernels.torch import adamw as kernel
from megakern.ops.adamw import adamw_reference

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")

# Smallest, one row, primes, several blocks (their size is lowered below), empty.
SHAPES = [(1,), (1, 64), (7, 13), (40, 9), (0, 4)]
OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
STEPS = 10


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 50)


def draw(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]


def parameters(dtype=torch.float32):
    return [torch.nn.Parameter(value) for value in draw(0, dtype)]


def train(params, optimizer, steps=range(STEPS), grad_scale=None):
    for step in steps:
        for param, gradient in zip(params, draw(100 + step, params[0].dtype), strict=True):
            param.grad = gradient
        optimizer.step() if grad_scale is None else optimizer.step(grad_scale=torch.tensor(grad_scale))


def reference(dtype=torch.float32, steps=STEPS, grad_scale=1.0, **options):
    """The trajectory in float64, from values rounded to `dtype`."""
    values = [value.double() for value in draw(0, dtype)]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
    for step in range(steps):
        for i, gradient in enumerate(draw(100 + step, dtype)):
            values[i], *moments[i] = adamw_reference(
                values[i], gradient.double(), *moments[i], step + 1, grad_scale=grad_scale, **{**OPTIONS, **options}
            )
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_torch_and_the_reference(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    train(ours, mk.AdamW(ours, **OPTIONS))
    train(theirs, torch.optim.AdamW(theirs, **OPTIONS, foreach=False))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for our, their, wide in zip(ours, theirs, reference(dtype), strict=True):
        torch.testing.assert_close(our.double(), wide, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("state_dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_follow_their_master(dtype, state_dtype, tolerance):
    params = parameters(dtype)
    optimizer = mk.AdamW(params, **OPTIONS, state_dtype=state_dtype)
    train(params, optimizer)
    for param, wide in zip(params, reference(dtype), strict=True):
        state = optimizer.state[param]
        assert state["master"].dtype == torch.float32 and state["exp_avg"].dtype == state_dtype
        torch.testing.assert_close(state["master"].double(), wide, rtol=tolerance, atol=tolerance)
        assert torch.equal(param, state["master"].to(dtype))


def test_bf16_moments_are_fp32_math_rounded_to_nearest():
    params = parameters()
    train(params, mk.AdamW(params, **OPTIONS, state_dtype=torch.bfloat16), steps=range(3))
    values = draw(0)
    moments = [(torch.zeros_like(value).bfloat16(), torch.zeros_like(value).bfloat16()) for value in values]
    for step in range(3):
        for i, gradient in enumerate(draw(100 + step)):
            before = (moment.float() for moment in moments[i])
            values[i], *after = adamw_reference(values[i], gradient, *before, step + 1, **OPTIONS)
            moments[i] = tuple(moment.bfloat16() for moment in after)
    for param, value in zip(params, values, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_scale_multiplies_and_leaves_the_gradients(dtype):
    params = parameters(dtype)
    optimizer = mk.AdamW(params, **OPTIONS)
    train(params, optimizer, grad_scale=0.125)
    for param, wide in zip(params, reference(dtype, grad_scale=0.125), strict=True):
        value = optimizer.state[param].get("master", param)
        torch.testing.assert_close(value.double(), wide, rtol=2e-6, atol=2e-6)
    for param, gradient in zip(params, draw(100 + STEPS - 1, dtype), strict=True):
        assert torch.equal(param.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_grads_leaves_zeros_after_the_same_update(dtype):
    runs = []
    for zero in (False, True):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4))
        param.grad = torch.linspace(1, -2, 12, dtype=dtype).view(4, 3).t()
        mk.AdamW([param]).step(zero_grads=zero)
        assert (param.grad == 0).all() == zero
        runs.append(param.detach())
    assert torch.equal(*runs)


def test_grad_scale_of_one_changes_nothing():
    plain, scaled = parameters(), parameters()
    train(plain, mk.AdamW(plain, **OPTIONS))
    train(scaled, mk.AdamW(scaled, **OPTIONS), grad_scale=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


def test_groups_and_schedulers():
    ours, theirs = parameters(), parameters()

    def groups(params):
        return [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 1e-2, "betas": (0.5, 0.7)}]

    optimizers = mk.AdamW(groups(ours), **OPTIONS), torch.optim.AdamW(groups(theirs), **OPTIONS)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in optimizers]
    for step in range(4):
        for params, optimizer, schedule in zip((ours, theirs), optimizers, schedules, strict=True):
            train(params, optimizer, steps=[step])
            schedule.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)


def test_parameters_without_gradient_stay_and_steps_are_counted_for_each():
    ours, theirs = parameters(), parameters()
    optimizer, other = mk.AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(3):
        for params, stepping in ((ours, optimizer), (theirs, other)):
            for i, (param, gradient) in enumerate(zip(params, draw(step), strict=True)):
                param.grad = None if i == 0 or (i == 3 and step == 1) else gradient
            stepping.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)
    assert ours[0] not in optimizer.state and optimizer.state[ours[3]]["step"] == 2
    assert torch.equal(ours[0], draw(0)[0])


def test_strided_parameter_and_gradient():
    values, gradient = torch.randn(6, 9), torch.randn(6, 9)
    for start, grad in ((values.clone().t(), gradient.t().contiguous()), (values.t().contiguous(), gradient.t())):
        param = torch.nn.Parameter(start)
        optimizer = mk.AdamW([param], **OPTIONS)
        expected, moments = values.t(), (torch.zeros(9, 6), torch.zeros(9, 6))
        for step in (1, 2):
            param.grad = grad / step
            optimizer.step()
            expected, *moments = adamw_reference(expected, gradient.t() / step, *moments, step, **OPTIONS)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_resumes_bit_for_bit(dtype, state_dtype):
    straight = parameters(dtype)
    optimizer = mk.AdamW(straight, **OPTIONS, state_dtype=state_dtype)
    train(straight, optimizer, steps=range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in straight]
    train(straight, optimizer, steps=range(3, 6))
    other = mk.AdamW(resumed, lr=1.0, state_dtype=state_dtype)
    other.load_state_dict(saved)
    train(resumed, other, steps=range(3, 6))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert value.dtype == other.state[b][name].dtype and torch.equal(value, other.state[b][name]), name


def test_loads_the_state_of_torch_optim():
    theirs = [
        torch.nn.Parameter(value.t().contiguous().t()) if value.ndim == 2 else torch.nn.Parameter(value)
        for value in draw(0)
    ]
    other = torch.optim.AdamW(theirs, **OPTIONS)
    train(theirs, other, steps=range(3))
    ours = [torch.nn.Parameter(param.detach().clone()) for param in theirs]
    optimizer = mk.AdamW(ours, **OPTIONS)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(theirs, other, steps=range(3, 6))
    train(ours, optimizer, steps=range(3, 6))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)


def test_deepcopy_keeps_the_options():
    params = parameters()
    copied = copy.deepcopy(mk.AdamW(params, **OPTIONS, state_dtype=torch.bfloat16))
    assert copied.state_dtype == torch.bfloat16 and copied.param_groups[0]["lr"] == OPTIONS["lr"]


def test_closure_runs_with_gradients():
    param = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = mk.AdamW([param], lr=0.5, weight_decay=0.0)

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(param.detach(), torch.tensor([1.5]))  # a first step is lr times the sign


def test_opcheck():
    params, grads = draw(0), draw(1)
    moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    options = (True, 1, 1e-3, 0.9, 0.95, 1e-8, 0.1, "torch")
    scale = torch.tensor(0.5)
    library.opcheck(torch.ops.megakern.adamw.default, (params, grads, *moments, [], scale, *options))
    narrow = [p.bfloat16() for p in params]
    library.opcheck(torch.ops.megakern.adamw.default, (narrow, grads, *moments, params, None, *options))


def run_dtensors(dtype) -> list:
    kernel.BLOCK = 50
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    placements = [
        Replicate(),
        Shard(0),
        Shard(1),
        Shard(0),
        Shard(0),
    ]  # of SHAPES: Shard(0) of (1, 64) leaves one empty

    def spread(values):
        return [distribute_tensor(v, mesh, [p]) for v, p in zip(values, placements, strict=True)]

    params = [torch.nn.Parameter(value) for value in spread(draw(0, dtype))]
    optimizer = mk.AdamW(params, **OPTIONS)
    for step in range(3):
        for param, gradient in zip(params, spread(draw(100 + step, dtype)), strict=True):
            param.grad = gradient
        optimizer.step(grad_scale=torch.tensor(0.5))
    for param in params:
        for name in {"exp_avg", "exp_avg_sq", *(["master"] if dtype == torch.bfloat16 else [])}:
            state = optimizer.state[param][name]
            assert isinstance(state, DTensor) and state.placements == param.placements, name
            assert state.dtype == torch.float32 and state.to_local().shape == param.to_local().shape
    params[1].grad = DTensor.from_local(torch.ones(1, 64, dtype=dtype), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"a gradient must be sharded as its parameter, .*Shard.*, got .*Partial"):
        optimizer.step()
    return [optimizer.state[param].get("master", param).full_tensor().detach() for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtensor_shards_are_updated_as_the_whole(ranks, dtype):
    expected = reference(dtype, steps=3, grad_scale=0.5)
    for values in ranks.run(run_dtensors, 2, dtype):
        for value, wide in zip(values, expected, strict=True):
            torch.testing.assert_close(value.double(), wide, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be 0 or more and finite, got -1.0"),
        ({"lr": float("nan")}, "lr must be 0 or more and finite, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1e-8}, "eps must be 0 or more, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"state_dtype": torch.float16}, "state_dtype must be torch.float32 or torch.bfloat16, got torch.float16"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mk.AdamW(parameters(), **options)
    if "state_dtype" not in options:
        with pytest.raises(ValueError, match=message):
            mk.AdamW([{"params": parameters(), **options}])


def test_bad_parameters_and_gradients_are_named():
    with pytest.raises(ValueError, match="amsgrad is not offered"):
        mk.AdamW([{"params": parameters(), "amsgrad": True}])
    with pytest.raises(TypeError, match=r"parameters must be float16, .* or float64, got torch\.complex64"):
        mk.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match=r"gradients must be dense, got one of layout torch\.sparse_coo"):
        mk.AdamW([param]).step()
    param.grad = torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"grad_scale must be a tensor of one element, got 0\.5"):
        mk.AdamW([param]).step(grad_scale=0.5)
    with pytest.raises(ValueError, match="backend 'cuda' was asked for, but"):
        mk.AdamW([param], backend="cuda").step()
    assert torch.equal(param, torch.ones(3, 2))


def test_the_op_compiles_in_one_graph():
    """The update itself, which mutates its inputs, inside a compiled function: the same bits as in eager mode."""

    def update(params, grads, exp_avgs, exp_avg_sqs, scale):
        torch.ops.megakern.adamw(
            params, grads, exp_avgs, exp_avg_sqs, [], scale, False, 3, 1e-2, 0.9, 0.95, 1e-8, 0.1, "torch"
        )
        return params[0] * 2

    def inputs():
        g = torch.Generator().manual_seed(4)
        lists = [[torch.rand(5, 3, generator=g), torch.rand(7, generator=g)] for _ in range(4)]
        return (*lists, torch.tensor(0.5))

    eager, compiled = inputs(), inputs()
    expected = update(*eager)
    got = torch.compile(update, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(got, expected)
    assert not torch.equal(expected, inputs()[0][0] * 2)
    for mine, theirs in zip(eager[:4], compiled[:4], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
