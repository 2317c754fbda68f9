"""The C++ kernels of AdamW and of the gradients' norm: float64, bit for bit over threads, nothing beside, refusals."""

from __future__ import annotations

import pytest
import torch

import megakern as mk
from megakern.kernels.torch import adamw, grad_norm, native
from megakern.kernels.torch.adamw import join_master, split_master
from megakern.ops.adamw import adamw_reference
from tests.closeness import assert_close_to_ref
from tests.test_cpu_kernels import DTYPES, draw, needs_kernels, same_bits_with_three_threads

# Smallest, a lane less and more than a vector, one piece (2^14) and more, several.
SIZES = [1, 15, 16, 17, (1 << 14) + 5, 40_003]
OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
NAMES = ["weight", "exp_avg", "exp_avg_sq"]


def guarded(values):
    """The tensors side by side in one memory, between guard elements -> views, and a check of the guards."""
    kind = values[0].dtype
    memory = torch.full((sum(v.numel() + 3 for v in values) + 3,), 7, dtype=kind)
    views, first, free = [], 3, torch.ones(memory.shape, dtype=torch.bool)
    for value in values:
        views.append(memory[first : first + value.numel()].copy_(value))
        free[first : first + value.numel()] = False
        first += value.numel() + 3
    return views, lambda: (memory[free] == 7).all()


def start(grad_dtype, moment_dtype):
    """Lists of weights (fp32), grads, exp_avgs, exp_avg_sqs; the second moments are positive, and one is 0."""
    weights = [draw(n, seed=n) for n in SIZES]
    grads = [draw(n, seed=n + 1, dtype=grad_dtype) for n in SIZES]
    first = [draw(n, seed=n + 2, scale=0.5).to(moment_dtype) for n in SIZES]
    second = [draw(n, seed=n + 3).square().to(moment_dtype) for n in SIZES]
    for moments in (first, second):
        moments[-1][::7] = 0
    return weights, grads, first, second


def step_of(launch_options, master, weights, grads, first, second, zero):
    """One step on copies between guards -> new weights, first and second moments, and the gradients after it."""
    checks, lists = [], []
    params, masters = weights, []
    if master != "none":
        params = [split_master(weight)[0] for weight in weights]
        masters = weights if master == "fp32" else [split_master(weight)[1] for weight in weights]
    for values in (params, grads, first, second, masters):
        views, check = guarded(values) if values else ([], lambda: True)
        lists.append(views)
        checks.append(check)
    adamw.adamw(*lists, torch.tensor(0.3), zero, *launch_options)
    assert all(check() for check in checks), "something was written beside a tensor"
    params, after, *moments, masters = lists
    if master == "split":
        masters = [join_master(param, low) for param, low in zip(params, masters, strict=True)]
    if master != "none":
        for param, whole in zip(params, masters, strict=True):
            assert torch.equal(param, split_master(whole)[0])
    return masters or params, *moments, after


@needs_kernels
@pytest.mark.parametrize("moment_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("master", ["none", "fp32", "split"])
def test_adamw(master, grad_dtype, moment_dtype):
    inputs = start(grad_dtype, moment_dtype)
    step = 3
    flat = (step, OPTIONS["lr"], *OPTIONS["betas"], OPTIONS["eps"], OPTIONS["weight_decay"])

    def ours(zero=True):
        return [t for tensors in step_of(flat, master, *inputs, zero) for t in tensors]

    count = len(SIZES)
    results = same_bits_with_three_threads(ours)
    assert all((grad == 0).all() for grad in results[3 * count :])
    kept = ours(zero=False)
    assert all(torch.equal(a, b) for a, b in zip(kept[: 3 * count], results[: 3 * count], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept[3 * count :], inputs[1], strict=True))
    with native.composites_only():
        composite = [t for tensors in step_of(flat, master, *inputs, True) for t in tensors]
    for i in range(count):
        wide = (tensors[i].double() for tensors in inputs)
        for name, j, reference in zip(
            NAMES, range(3), adamw_reference(*wide, step, grad_scale=0.3, **OPTIONS), strict=True
        ):
            assert_close_to_ref(results[j * count + i], reference, composite[j * count + i], name=name)


@needs_kernels
def test_both_kinds_of_master_have_the_same_bits():
    inputs = start(torch.float32, torch.float32)
    flat = (3, OPTIONS["lr"], *OPTIONS["betas"], OPTIONS["eps"], OPTIONS["weight_decay"])
    whole, split = (step_of(flat, master, *inputs, False)[0] for master in ("fp32", "split"))
    for a, b in zip(whole, split, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@needs_kernels
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.bfloat16, torch.float32]])
def test_sum_of_squares(dtypes):
    tensors = [draw(n, seed=n, dtype=dtypes[i % len(dtypes)]) for i, n in enumerate([*SIZES, 0])]
    tensors.append(draw(61, 40, dtype=dtypes[0]).t())
    (total,) = same_bits_with_three_threads(lambda: (grad_norm.sum_of_squares(tensors)[None],))
    reference = sum(t.double().square().sum() for t in tensors)[None]
    with native.composites_only():
        composite = grad_norm.sum_of_squares(tensors)[None]
    assert total.dtype == composite.dtype == torch.float32
    assert_close_to_ref(total, reference, composite)
    assert_close_to_ref(total, reference, reference.float(), name="sum in fp64")


@needs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 16, -1])
def test_a_gradient_that_is_not_finite_shows(value, place):
    tensors = [draw(n) for n in SIZES]
    tensors[4][place] = value
    assert not grad_norm.sum_of_squares(tensors).isfinite()
    lists = [tensors, *([torch.ones(n) for n in SIZES] for _ in range(2))]
    params = [torch.ones(n) for n in SIZES]
    adamw.adamw(params, *lists, [], None, False, 1, 1e-3, 0.9, 0.95, 1e-8, 0.1)
    assert not params[4][place].isfinite()  # inf / inf
    params[4][place] = 0
    assert all(param.isfinite().all() for param in params)


@needs_kernels
def test_the_optimizer_runs_on_the_kernels(monkeypatch):
    """`mk.AdamW` and the norm call them for what they take, and not inside `composites_only`."""
    called = []
    for name in ("adamw", "sum_of_squares"):
        kernel = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, kernel=kernel, name=name: called.append(name) or kernel(*a))

    def run(dtype):
        param = torch.nn.Parameter(draw(5, 7, dtype=dtype))
        param.grad = draw(5, 7, seed=1, dtype=dtype)
        mk.clip_grad_norm_([param], 1.0, scale_in_place=False)
        mk.AdamW([param]).step()
        found, called[:] = list(called), []
        return found

    assert run(torch.float32) == run(torch.bfloat16) == ["sum_of_squares", "adamw"]
    assert run(torch.float16) == run(torch.float64) == []
    with native.composites_only():
        assert run(torch.float32) == []


@needs_kernels
@pytest.mark.parametrize(
    "change, message",
    [
        ({"param_dtype": 2}, r"adamw: dtype code must be 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"master_kind": 3}, r"master code must be 0 \(none\), 1 \(fp32\) or 2 \(low half\), got 3"),
        ({"param_dtype": 1}, "bf16 params have a master, fp32 ones have none"),
        ({"threads": 0}, "threads must be positive, got 0"),
        ({"param": 0}, "the address of param is null"),
        ({"exp_avg": 0}, "the address of exp_avg is null"),
        ({"grad": (1 << 21) + 2}, "the address of grad must be a multiple of 4, got"),
        ({"param_dtype": 1, "master_kind": 1}, "the address of master is null"),
        ({"exp_avg_sq": 1 << 22}, "two tensors of a param have one address"),
        ({"elements": 0}, "the number of elements must be positive, got 0"),
        ({"elements": 1 << 61}, "elements are more than an address can reach"),
    ],
)
def test_the_adamw_binding_refuses(change, message):
    from megakern import _cpu

    a = {"param_dtype": 0, "master_kind": 0, "threads": 1, "param": 1 << 20, "grad": 1 << 21, "exp_avg": 1 << 22}
    a |= {"exp_avg_sq": 1 << 23, "master": 0, "elements": 4} | change
    problem = _cpu.AdamwProblem(a["param_dtype"], 0, 0, a["master_kind"], *[0.5] * 9, False, a["threads"])
    addresses = (a["param"], a["grad"], a["exp_avg"], a["exp_avg_sq"], a["master"])
    with pytest.raises(ValueError, match=message):
        _cpu.adamw(problem, [_cpu.AdamwTensors(*addresses, a["elements"])])


@needs_kernels
@pytest.mark.parametrize(
    "data, count, dtype, threads, message",
    [
        (0, 4, 0, 1, "the address of a tensor is null"),
        (2, 4, 0, 1, "the address of a tensor must be a multiple of 4, got 2"),
        (4, 0, 0, 1, "the number of elements must be positive, got 0"),
        (4, 4, 2, 1, r"dtype code must be 0 \(fp32\) or 1 \(bf16\), got 2"),
        (4, 4, 0, 0, "threads must be positive, got 0"),
    ],
)
def test_the_sum_of_squares_binding_refuses(data, count, dtype, threads, message):
    from megakern import _cpu

    with pytest.raises(ValueError, match=message):
        _cpu.sum_of_squares([_cpu.Elements(data, count, dtype)], threads)
