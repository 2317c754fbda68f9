"""gradient_norm, clip_coefficient and clip_grad_norm_: one process, and meshes of two and four gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import library
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import megakern as mk
from megakern.ops import grad_norm
from megakern.ops.grad_norm import clip_coefficient, gradient_norm, gradient_norm_reference

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")

SHAPES = [(1,), (7, 13), (40, 8), (0, 4), (5,)]


def with_gradients(dtype=torch.float32, *, size=1.0, missing=()):
    g = torch.Generator().manual_seed(0)
    params = []
    for i, shape in enumerate(SHAPES):
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        gradient = (torch.randn(shape, generator=g) * size).to(dtype)
        param.grad = None if i in missing else gradient
        params.append(param)
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("max_norm", [1.0, 1e3])
def test_matches_torch(dtype, max_norm):
    ours, theirs = with_gradients(dtype, missing=[2]), with_gradients(torch.float64, missing=[2])
    for our, their in zip(ours, theirs, strict=True):
        their.grad = None if our.grad is None else our.grad.double().clone()
    norm = mk.clip_grad_norm_(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.shape == () and norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    for our, their in zip(ours, theirs, strict=True):
        if our.grad is not None:
            # One rounding of the product, with a coefficient that was not rounded to the gradient's dtype first.
            torch.testing.assert_close(
                our.grad.double(), their.grad, rtol=torch.finfo(dtype).eps * 0.51 + 2e-7, atol=1e-7
            )


def test_mixed_dtypes_and_one_tensor():
    params = [*with_gradients(torch.float32), *with_gradients(torch.bfloat16), *with_gradients(torch.float64)]
    expected = gradient_norm_reference(param.grad for param in params)
    torch.testing.assert_close(gradient_norm(iter(params)), expected, rtol=1e-6, atol=0)
    one = with_gradients()[1]
    before = gradient_norm_reference([one.grad])
    torch.testing.assert_close(mk.clip_grad_norm_(one, 0.5).double(), before, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_norm(one), torch.tensor(0.5), rtol=1e-5, atol=0)


def test_small_and_large_fp16_gradients_do_not_leave_its_range():
    for size in (1e-6, 1e3):
        params = with_gradients(torch.float16, size=size)
        torch.testing.assert_close(
            gradient_norm(params).double(), gradient_norm_reference(p.grad for p in params), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("arguments", [{"max_norm": 1.0, "scale_in_place": False}, {"max_norm": float("inf")}])
def test_measuring_leaves_the_gradients(arguments):
    params = with_gradients()
    before = [param.grad.clone() for param in params]
    norm = mk.clip_grad_norm_(params, **arguments)
    torch.testing.assert_close(norm.double(), gradient_norm_reference(before), rtol=1e-6, atol=0)
    assert all(torch.equal(param.grad, gradient) for param, gradient in zip(params, before, strict=True))


def test_coefficient_goes_to_the_optimizer():
    clipped, scaled = with_gradients(), with_gradients()
    mk.clip_grad_norm_(clipped, 0.5)
    mk.AdamW(clipped).step()
    norm = mk.clip_grad_norm_(scaled, 0.5, scale_in_place=False)
    mk.AdamW(scaled).step(grad_scale=clip_coefficient(norm, 0.5))
    for a, b in zip(clipped, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_coefficient():
    torch.testing.assert_close(clip_coefficient(torch.tensor(4.0), 1.0), torch.tensor(0.25))
    torch.testing.assert_close(clip_coefficient(torch.tensor(1e-6), 1e-6), torch.tensor(0.5))
    assert clip_coefficient(torch.tensor(0.5), 1.0) == 1 and clip_coefficient(torch.tensor(0.0), 1.0) == 1
    assert clip_coefficient(torch.tensor(9.0), float("inf")) == 1
    assert clip_coefficient(torch.tensor(float("nan")), 1.0).isnan()


def test_no_gradients_is_zero():
    assert mk.clip_grad_norm_(with_gradients(missing=range(5)), 1.0) == 0
    assert mk.clip_grad_norm_([], 1.0) == 0


def test_opcheck():
    gradients = [param.grad for param in with_gradients(torch.bfloat16)]
    library.opcheck(torch.ops.megakern.sum_of_squares.default, (gradients, "torch"))


def test_wrong_input_is_named():
    params = with_gradients()
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be above 0, got"):
            mk.clip_grad_norm_(params, bad)
    with pytest.raises(ValueError, match="backend 'cuda' was asked for, but"):
        mk.clip_grad_norm_(params, 1.0, backend="cuda")
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(TypeError, match=r"gradients must be dense .* of layout torch\.sparse_coo"):
        gradient_norm(params)


# --- several ranks ---


def spread_parameters(dtype) -> list[torch.nn.Parameter]:
    """SHAPES over a (dp, tp) mesh in every way: sharded on both dims, on one of each, uneven, replicated, and plain."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    homes = [
        (mesh["tp"], [Replicate()]),
        (mesh, [Replicate(), Shard(0)]),  # 7 rows over 2 ranks: 4 and 3
        (mesh, [Shard(0), Shard(1)]),
        (mesh["tp"], [Shard(0)]),  # empty
        (None, None),
    ]
    params = []
    for whole, (where, placements) in zip(with_gradients(dtype), homes, strict=True):
        if where is None:
            params.append(whole)
            continue
        param = torch.nn.Parameter(distribute_tensor(whole.detach(), where, placements))
        param.grad = distribute_tensor(whole.grad, where, placements)
        params.append(param)
    extra = torch.nn.Parameter(distribute_tensor(torch.zeros(6, 3, dtype=dtype), mesh["dp"], [Shard(0)]))
    extra.grad = distribute_tensor(torch.arange(18, dtype=dtype).reshape(6, 3), mesh["dp"], [Shard(0)])
    return [*params, extra]


def clip_spread(dtype, max_norm) -> tuple:
    params = spread_parameters(dtype)
    calls, real = [], grad_norm.all_reduce_in_place

    def counted(tensor, *rest, **named):
        calls.append(tuple(tensor.shape))
        return real(tensor, *rest, **named)

    grad_norm.all_reduce_in_place = counted
    try:
        norm = mk.clip_grad_norm_(params, max_norm)
    finally:
        grad_norm.all_reduce_in_place = real
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in params]
    return norm, gradients, calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size, max_norm", [(2, 1.0), (4, 1.0), (4, 1e6)])
def test_sharded_replicated_and_plain_gradients(ranks, size, max_norm, dtype):
    params = with_gradients(dtype)
    extra = torch.nn.Parameter(torch.zeros(6, 3, dtype=dtype))
    extra.grad = torch.arange(18, dtype=dtype).reshape(6, 3)
    whole = [torch.nn.Parameter(param.detach().double()) for param in (*params, extra)]
    for param, source in zip(whole, (*params, extra), strict=True):
        param.grad = source.grad.double()
    expected = torch.nn.utils.clip_grad_norm_(whole, max_norm)
    for norm, gradients, calls in ranks.run(clip_spread, size, dtype, max_norm):
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
        for gradient, param in zip(gradients, whole, strict=True):
            tolerance = torch.finfo(dtype).eps * 0.51 + 2e-7
            torch.testing.assert_close(gradient.double(), param.grad, rtol=tolerance, atol=1e-7)
        assert len(calls) == (1 if size == 2 else 2), "one all-reduce for each mesh dim that shards a gradient"


def refuse_partial() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    param = torch.nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Replicate()]))
    param.grad = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    with pytest.raises(
        ValueError, match=r"a gradient has placements .*Partial.*: its sum over the ranks of mesh dim 0"
    ):
        gradient_norm([param])


def test_partial_gradients_are_refused(ranks):
    ranks.run(refuse_partial, 2)


def test_the_op_compiles_in_one_graph():
    gradients = [torch.arange(6.0).reshape(2, 3), torch.full((4,), -2.0)]

    def norm(tensors):
        return torch.ops.megakern.sum_of_squares(tensors, "torch").sqrt()

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(gradients).double(), torch.tensor(71.0, dtype=torch.float64).sqrt(), rtol=1e-6, atol=0
    )
