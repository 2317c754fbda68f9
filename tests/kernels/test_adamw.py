"""The AdamW of every compiled backend against float64 and against the `torch` backend."""

from __future__ import annotations

import pytest
import torch
from torch import library

import megakern as mk
from megakern.ops.adamw import adamw_reference
from megakern.ops.dispatch import launcher
from tests.kernels.inputs import draw, fenced

OP = "AdamW"

# Smallest, primes, beside one tile and one piece (1024 and 8192 elements), several pieces, empty.
SHAPES = [(1,), (7, 13), (1025,), (8193,), (3, 40), (2, 8192), (0, 4)]
OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
STEPS = 4


def parameters(dtype, device, shapes=SHAPES):
    values = [draw(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]
    return [torch.nn.Parameter(value) for value in values]


def train(params, grad_dtype, grad_scale, **options):
    for param in params:
        param.grad_dtype = grad_dtype
    optimizer = mk.AdamW(params, **OPTIONS, **options)
    scale = None if grad_scale is None else torch.tensor(grad_scale, device=params[0].device)
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad = draw(*param.shape, dtype=grad_dtype, device=param.device, seed=100 * step + i)
        optimizer.step(grad_scale=scale)
    return optimizer


def reference(dtype, grad_dtype, device, grad_scale):
    """The trajectories in float64, from the same rounded starts and gradients."""
    values = [param.detach().double() for param in parameters(dtype, device)]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
    for step in range(STEPS):
        for i, value in enumerate(values):
            grad = draw(*value.shape, dtype=grad_dtype, device=device, seed=100 * step + i).double()
            values[i], *moments[i] = adamw_reference(
                value, grad, *moments[i], step + 1, grad_scale=grad_scale or 1.0, **OPTIONS
            )
    return values, moments


@pytest.mark.parametrize("grad_scale", [None, 0.25])
@pytest.mark.parametrize(
    "dtype, grad_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
)
def test_parameters_and_masters_follow_float64(dtype, grad_dtype, grad_scale, device, backend):
    params = parameters(dtype, device)
    optimizer = train(params, grad_dtype, grad_scale, backend=backend)
    values, moments = reference(dtype, grad_dtype, device, grad_scale)
    for param, wide, (exp_avg, exp_avg_sq) in zip(params, values, moments, strict=True):
        state = optimizer.state[param]
        exact = state.get("master", param).double()
        torch.testing.assert_close(exact, wide, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state["exp_avg"].double(), exp_avg, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state["exp_avg_sq"].double(), exp_avg_sq, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(param.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_bf16_moments(device, backend):
    runs = {}
    for each in ("torch", backend):
        params = parameters(torch.bfloat16, device)
        optimizer = train(params, torch.bfloat16, None, backend=each, state_dtype=torch.bfloat16)
        runs[each] = [optimizer.state[param] for param in params]
    for ours, theirs in zip(runs[backend], runs["torch"], strict=True):
        assert ours["exp_avg"].dtype == torch.bfloat16
        # Triton's interpreter cuts bf16 where a GPU rounds: up to one unit, 2^-7, lost in each step.
        torch.testing.assert_close(ours["master"], theirs["master"], rtol=4e-3, atol=4e-3)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=STEPS * 2**-7, atol=1e-2)


def test_a_split_master_trains_bit_for_bit_like_a_whole_one(device, backend):
    whole, split = parameters(torch.bfloat16, device), parameters(torch.bfloat16, device)
    masters = train(whole, torch.float32, 0.5, backend=backend).state
    halves = train(split, torch.float32, 0.5, backend=backend, master="split").state
    for one, other in zip(whole, split, strict=True):
        assert torch.equal(one, other)
        bits = (other.view(torch.int16).int() << 16) + halves[other]["low"].int()
        assert torch.equal(bits.view(torch.float32), masters[one]["master"])


def test_rounding_of_every_kind_of_number(device, backend):
    """Ties, subnormals, infinities and both zeros survive a split and a join; a step of nothing changes no bit."""
    bits = torch.tensor([0, 0x8000, 0x7FFF, 0x18000, -(2**31), 0x3F808000, 0x7F800000, 0x007FFFFF, -1 << 23])
    master = bits.int().view(torch.float32).to(device)
    param = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16).to(device)
    low, before = bits.to(torch.int16).to(device), param.clone()
    zeros = torch.zeros(len(bits), device=device)
    adamw = launcher(backend, "adamw", "adamw")
    adamw([param], [zeros], [zeros.clone()], [zeros.clone()], [low], None, False, 1, 0.0, 0.9, 0.9, 1e-8, 0.0)
    assert torch.equal(param.view(torch.int16), before.view(torch.int16))
    finite = bits.int().ne(-1 << 23).to(device)
    joined = ((param.view(torch.int16).int() << 16) + low.int()).view(torch.float32)
    assert torch.equal(joined[finite], master[finite])


def test_neighbours_in_memory_stay_and_strides_are_kept(device, backend):
    """Parameters and moments cut from one buffer at odd offsets, a transposed parameter, gradients that are views.

    The neighbours are numbers: a NaN that is read, updated and written back would still be NaN.
    """
    OTHER = 7.0
    odd, exp_avgs, exp_avg_sqs = (torch.full((64,), OTHER, device=device) for _ in range(3))
    cut = slice(3, 20)
    odd[cut] = draw(17, device=device)
    params = [odd[cut], draw(4, 4, device=device, seed=1).t()]
    grads = [fenced(draw(1, 17, device=device, seed=2))[0], draw(1, 1, device=device, seed=3).expand(4, 4)]
    expected = [
        adamw_reference(p.double(), g.double(), torch.zeros_like(p), torch.zeros_like(p), 1, **OPTIONS)[0]
        for p, g in zip(params, grads, strict=True)
    ]
    moments = [[buffer[cut].zero_(), torch.zeros(4, 4, device=device)] for buffer in (exp_avgs, exp_avg_sqs)]
    launcher(backend, "adamw", "adamw")(params, grads, *moments, [], None, False, 1, 3e-2, 0.8, 0.9, 1e-6, 0.1)
    for param, wide in zip(params, expected, strict=True):
        torch.testing.assert_close(param.double(), wide, rtol=1e-6, atol=1e-6)
    for buffer in (odd, exp_avgs, exp_avg_sqs):
        assert (buffer[: cut.start] == OTHER).all() and (buffer[cut.stop :] == OTHER).all()


def test_zero_grads(device, backend):
    """Zeros afterwards, in aligned, odd and strided gradients and where there were infinities; the same update."""
    runs = []
    for zero in (False, True):
        params = parameters(torch.bfloat16, device, [(1025,), (17,), (4, 6)])
        field = torch.full((40,), 7.0, device=device)
        grads = [draw(1025, device=device), field[3:20].copy_(draw(17, device=device)), draw(6, 4, device=device).t()]
        for param, grad in zip(params, grads, strict=True):
            param.grad_dtype, param.grad = torch.float32, grad
        grads[0][5] = float("inf")
        mk.AdamW(params, **OPTIONS, backend=backend).step(zero_grads=zero)
        assert all((grad == 0).all() == zero for grad in grads)
        assert (field[:3] == 7).all() and (field[20:] == 7).all()
        runs.append([param.detach() for param in params])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_more_tensors_than_the_arguments_of_a_launch_hold(device, backend):
    """76 in a short list of addresses, 615 in a long one; of differing sizes, so that a wrong row shows."""
    for count in (77, 700) if backend != "triton" else (77,):  # Triton has one kind of list
        values = [draw(1 + i % 5, device=device, seed=i) for i in range(count)]
        params = [torch.nn.Parameter(value.clone()) for value in values]
        for i, param in enumerate(params):
            param.grad = draw(*param.shape, device=device, seed=1000 + i)
        mk.AdamW(params, **OPTIONS, backend=backend).step()
        for param, value in zip(params, values, strict=True):
            zero = torch.zeros_like(value).double()
            wide = adamw_reference(value.double(), param.grad.double(), zero, zero, 1, **OPTIONS)[0]
            torch.testing.assert_close(param.double(), wide, rtol=1e-6, atol=1e-6)


def test_one_launch_a_step(device, backend, monkeypatch):
    from megakern.kernels.cuda import adamw as compiled
    from megakern.kernels.triton import adamw as triton

    module, name = (triton, "launch") if backend == "triton" else (compiled, "call")
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(a), real(*a, **k)))
    train(parameters(torch.bfloat16, device), torch.bfloat16, None, backend=backend)
    assert len(calls) == STEPS


def test_explain_names_the_configuration(device, backend):
    text = str(mk.explain("AdamW", parameters(torch.float32, device), backend=backend))
    assert ("pieces-8192" if backend == "triton" else "all tensors in one launch") in text


@pytest.mark.parametrize("kind", ["fp32", "master", "split"])
def test_opcheck_and_compile(kind, device, backend, unguarded):
    """An op that changes its arguments, in a compiled function as in eager mode."""
    adamw = torch.ops.megakern.adamw

    def update(params, grads, *state):
        adamw(params, grads, *state, False, 3, 1e-2, 0.9, 0.95, 1e-8, 0.1, backend)
        return params[0] * 2

    def arguments():
        values, grads, exp_avgs = ([draw(*s, device=device, seed=i + at) for at, s in enumerate([(5, 3), (1025,)])]
                                   for i in (0, 10, 20))  # fmt: skip
        exp_avg_sqs = [x.square() for x in exp_avgs]
        masters = {"fp32": [], "master": [x.clone() for x in values]}.get(kind)
        if masters is None:
            masters = [torch.full_like(x, 7, dtype=torch.int16) for x in values]
        params = values if kind == "fp32" else [x.bfloat16() for x in values]
        return params, grads, exp_avgs, exp_avg_sqs, masters, torch.tensor(0.5, device=device)

    library.opcheck(adamw.default, (*arguments(), True, 3, 1e-2, 0.9, 0.95, 1e-8, 0.1, backend))
    eager, given = arguments(), arguments()
    expected = update(*eager)
    assert torch.equal(torch.compile(update, fullgraph=True, backend="aot_eager")(*given), expected)
    assert not torch.equal(expected, arguments()[0][0] * 2)
    for mine, theirs in zip(eager[:5], given[:5], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
