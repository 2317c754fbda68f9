"""Gradients accumulated in fp32 over micro-batches, of one op, of a model, over ranks and under FSDP2."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import megakern as mk
from megakern.layers.parameter import accumulate_in_fp32
from megakern.ops.gradients import GradientTarget
from megakern.ops.linear import parameter_gradients
from megakern.parallel.collectives import finish_gradients
from megakern.parallel.context import ParallelContext
from tests.closeness import assert_close_to_ref

MODEL = mk.GPTConfig(layers=2, width=32, heads=2, vocab_size=61, sequence_length=16, vocab_multiple=16)
ROPE = mk.GPTConfig(
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    vocab_size=61,
    sequence_length=16,
    vocab_multiple=16,
    positions="rope",
    norm="rmsnorm",
    activation="swiglu",
    qk_norm=True,
    tied_embeddings=False,
)
MICRO_BATCHES = 8


def test_64_micro_batches_of_a_linear_layer():
    """fp32 sums keep what one product has; bf16 sums lose most of each late micro-batch."""
    g = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    target = GradientTarget(torch.float32, parameter)
    exact = torch.zeros(24, 16, dtype=torch.float64)
    plain, narrow = torch.zeros(24, 16), torch.zeros(24, 16, dtype=torch.bfloat16)
    for _ in range(64):
        dz, x = ((torch.randn(5, 7, n, generator=g) + 0.5).bfloat16() for n in (24, 16))
        dweight, dbias = parameter_gradients(dz, x, target, torch.float32, "torch")
        assert dbias.dtype == torch.float32
        if parameter.grad is None:
            parameter.grad = dweight
        else:
            assert dweight is None
        rows, columns = dz.reshape(-1, 24), x.reshape(-1, 16)
        exact += rows.double().t() @ columns.double()
        plain += (rows.t() @ columns).float()
        narrow += rows.t() @ columns
    assert_close_to_ref(parameter.grad, exact, plain)
    error, narrow_error = ((t.double() - exact).abs().max() for t in (parameter.grad, narrow))
    assert error * 4 < narrow_error


def test_fp32_operands_are_added_in_place():
    dz, x = torch.randn(9, 6), torch.randn(9, 4)
    parameter = torch.nn.Parameter(torch.zeros(6, 4))
    parameter.grad = torch.ones(6, 4)
    buffer = parameter.grad
    assert parameter_gradients(dz, x, GradientTarget(torch.float32, parameter), None, "torch") == (None, None)
    assert parameter.grad is buffer
    torch.testing.assert_close(buffer.double(), 1 + dz.double().t() @ x.double(), rtol=1e-5, atol=1e-5)


def test_a_gradient_of_another_dtype_is_left_to_autograd():
    parameter = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    parameter.grad = torch.ones(6, 4, dtype=torch.bfloat16)
    dz, x = torch.randn(9, 6).bfloat16(), torch.randn(9, 4).bfloat16()
    dweight, _ = parameter_gradients(dz, x, GradientTarget(torch.float32, parameter), None, "torch")
    assert dweight.dtype == torch.float32 and bool((parameter.grad == 1).all())


def batches(config, rows=2):
    g = torch.Generator().manual_seed(3)
    shape = (MICRO_BATCHES, rows, config.sequence_length)
    return [torch.randint(config.vocab_size, shape, generator=g) for _ in range(2)]


def build(config, dtype, parallel=None, compute_dtype=None):
    """A model of bf16-rounded weights, the same for every dtype, with biases that are not zero."""
    model = mk.GPT(config, parallel, seed=1, dtype=dtype, compute_dtype=compute_dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.01)
            parameter.copy_(parameter.bfloat16())
    return model


def accumulate(model, config):
    for tokens, targets in zip(*batches(config), strict=True):
        model(tokens, targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reference(config):
    return accumulate(build(config, torch.float64), config)


@pytest.mark.parametrize("config", [MODEL, ROPE], ids=["tied", "rope"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_in_bf16_compute(config, dtype):
    """fp32 gradients of bf16 and fp32 parameters against float64; plain bf16 autograd is the yardstick, and worse."""
    exact = reference(config)
    model = build(config, dtype, compute_dtype=torch.bfloat16)
    accumulate_in_fp32(model)
    ours = accumulate(model, config)
    plain = accumulate(build(config, torch.bfloat16), config)
    total, total_plain = 0.0, 0.0
    for name, wide in exact.items():
        assert ours[name].dtype == torch.float32, name
        assert_close_to_ref(ours[name], wide, plain[name], name=name, floor=8e-3)
        total += (ours[name].double() - wide).norm().item() ** 2
        total_plain += (plain[name].double() - wide).norm().item() ** 2
    assert total < 0.8 * total_plain


def test_a_gradient_made_in_fp32_reaches_the_parameter_unrounded():
    """The rows of tokens that come more than once are fp32 sums on every device: bf16 cannot hold them."""
    model = build(ROPE, torch.bfloat16)
    accumulate_in_fp32(model)
    tokens, targets = (batch[0] for batch in batches(ROPE))
    model(tokens, targets).backward()
    often = model.embedding.weight.grad[tokens.flatten().bincount(minlength=len(model.embedding.weight)) > 1]
    assert len(often) > 3
    assert (often.bfloat16() != often).float().mean() > 0.2


def test_the_sum_over_micro_batches_is_that_of_their_gradients_bit_for_bit():
    """Each micro-batch alone, added up in fp32 by plain PyTorch."""
    model = build(MODEL, torch.bfloat16)
    accumulate_in_fp32(model)
    sums = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for tokens, targets in zip(*batches(MODEL), strict=True):
        model(tokens, targets).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad
            parameter.grad = None
    for name, gradient in accumulate(model, MODEL).items():
        assert torch.equal(gradient, sums[name]), name


def test_matrices_of_linear_layers_are_added_in_place(monkeypatch):
    from megakern.ops import linear as ops

    made = []
    real = ops.weight_gradient
    monkeypatch.setattr(ops, "weight_gradient", lambda *a: made.append(a[2]) or real(*a))
    model = build(MODEL, torch.bfloat16)
    accumulate_in_fp32(model)
    tokens, targets = (batch[0] for batch in batches(MODEL))
    model(tokens, targets).backward()
    assert made.count(torch.float32) == 4 * MODEL.layers
    made.clear()
    buffers = {name: parameter.grad for name, parameter in model.named_parameters()}
    model(tokens, targets).backward()
    assert not made  # the biases' gradients come with them
    assert all(parameter.grad is buffers[name] for name, parameter in model.named_parameters())


def test_nothing_is_recorded_without_gradients_and_the_output_is_the_same():
    model = build(MODEL, torch.bfloat16)
    tokens, targets = (batch[0] for batch in batches(MODEL))
    before = model(tokens, targets)
    accumulate_in_fp32(model)
    after = model(tokens, targets)
    assert abs(after.item() - before.item()) < 2e-3  # vectors are read in fp32 now
    with torch.no_grad():
        assert not model(tokens, targets).requires_grad


def run_tensor_parallel(config, sequence_parallel):
    parallel = ParallelContext.create(tp=dist.get_world_size(), sequence_parallel=sequence_parallel)
    model = build(config, torch.bfloat16, parallel)
    accumulate_in_fp32(model)
    gradients = accumulate(model, config)
    finish_gradients(model.parameters())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient.dtype == torch.float32 and isinstance(gradient, DTensor) for gradient in gradients.values())
    return {name: gradient.full_tensor() for name, gradient in gradients.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("config", [MODEL, ROPE], ids=["tied", "rope"])
def test_tensor_parallel(ranks, config, sequence_parallel):
    exact, plain = reference(config), accumulate(build(config, torch.bfloat16), config)
    for gradients in ranks.run(run_tensor_parallel, 2, config, sequence_parallel):
        for name, wide in exact.items():
            assert_close_to_ref(gradients[name], wide, plain[name], name=name, floor=2e-2)


def run_fsdp(config):
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = build(config, torch.bfloat16)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    accumulate_in_fp32(model)
    seen = set()
    for index, (tokens, targets) in enumerate(zip(*batches(config), strict=True)):
        last = index == MICRO_BATCHES - 1
        model.set_requires_gradient_sync(last)
        own = slice(dist.get_rank(), dist.get_rank() + 1)
        model(tokens[own], targets[own]).backward()
        if not last:
            model.unshard()
            seen |= {
                parameter.grad.dtype for parameter in model.parameters(recurse=False) if parameter.grad is not None
            }
            seen |= {parameter.grad.dtype for parameter in (model.embedding.weight, model.norm.weight)}
            model.reshard()
    assert seen == {torch.float32}, seen
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def test_fsdp_reduces_fp32_sums(ranks):
    """The sum over micro-batches and ranks is fp32, and stays so in the shards of bf16 parameters."""
    exact, plain = reference(MODEL), accumulate(build(MODEL, torch.bfloat16), MODEL)
    for gradients in ranks.run(run_fsdp, 2, MODEL):
        for name, wide in exact.items():
            assert_close_to_ref(gradients[name], wide, plain[name], name=name, floor=1e-2)
