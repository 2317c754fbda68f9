"""The norms of every compiled backend against float64, over awkward shapes."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import library

import megakern as mk
from megakern.kernels.cuda import configs as cuda_configs
from megakern.kernels.cuda.module import call
from megakern.ops.norm import layer_norm_reference, rms_norm_reference
from tests.closeness import assert_gradients_close
from tests.kernels.conftest import INTERPRETED
from tests.kernels.inputs import DTYPES, draw, fenced

OP = "layer_norm"
NORMS = {"layer": (mk.layer_norm, layer_norm_reference), "rms": (mk.rms_norm, rms_norm_reference)}
CASES = [("layer", False), ("rms", True)]  # test_every_configuration has the other two
# One row, primes, the narrowest tile and its neighbours, several tiles of rows, empty; 16-byte rows of no power of two.
SHAPES = [(1, 3), (7, 13), (3, 5, 127), (2, 128), (2, 129), (40, 130), (37, 72), (0, 16)]


def make(shape, dtype, device, *, norm, residual, weight_dtype=None):
    C, given = shape[-1], {"dtype": dtype, "device": device}
    weights = {"dtype": weight_dtype or dtype, "device": device}
    inputs = {"x": draw(*shape, **given, scale=2.0) + 1, "weight": draw(C, **weights, seed=1) + 1}
    if norm == "layer":
        inputs["bias"] = draw(C, **weights, seed=2)
    if residual:
        inputs["residual"] = draw(*shape, **given, seed=3)
    return inputs


def check(norm, inputs, backend):
    ours, reference = NORMS[norm]
    assert_gradients_close(partial(ours, backend=backend), reference, inputs)


@pytest.fixture
def few_programs(backend, monkeypatch):
    """Fewer programs than row tiles, so that each owns several."""
    if backend == "triton":
        from megakern.kernels.triton import configs

        monkeypatch.setattr(configs, "persistent", lambda config: 3)
        yield
        return
    cuda_configs.Rows.of.cache_clear()
    monkeypatch.setattr(cuda_configs, "MULTIPROCESSORS", 1)
    rule = dataclasses.replace(cuda_configs.BACKWARD, resident=1, clusters=(3, 2, 1, 1))
    monkeypatch.setattr(cuda_configs, "BACKWARD", rule)
    yield
    cuda_configs.Rows.of.cache_clear()


@pytest.fixture(autouse=True)
def wide_sums(request, monkeypatch):
    """The interpreter takes a time for each program, and the sum of the weight gradient's parts has one for 16 columns:
    of long rows nine tenths of the tests' time."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if INTERPRETED and max(parameters.get("C", 0), *parameters.get("shape", (0,))) > 1000:
        from megakern.kernels.triton import configs

        wide = dataclasses.replace(configs.SUM_PARTS, tiles={**configs.SUM_PARTS.tiles, "COLS": 512})
        monkeypatch.setattr(configs, "SUM_PARTS", wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm, residual, shape", [(*case, shape) for shape in SHAPES for case in CASES])
def test_output_and_gradients(norm, shape, dtype, residual, device, backend):
    check(norm, make(shape, dtype, device, norm=norm, residual=residual), backend)


LONG = [pytest.param(C, marks=pytest.mark.slow) for C in (65536, 131072, 131080, 140000)]


@pytest.mark.parametrize("C", [1024, 2047, 4096, 8191, 8193, 16384, 16385, 16392, 32776, *LONG])
@pytest.mark.parametrize("norm", NORMS)
def test_every_configuration(norm, C, device, backend):
    inputs = make((2, C), torch.bfloat16, device, norm=norm, residual=norm == "layer", weight_dtype=torch.float32)
    check(norm, inputs, backend)


@pytest.mark.parametrize("shape", [(45, 20), (600, 16), (7, 8104), (7, 8200), (5, 16400)])
@pytest.mark.parametrize("norm", NORMS)
def test_programs_that_own_several_row_tiles(norm, shape, device, backend, few_programs):
    check(norm, make(shape, torch.float32, device, norm=norm, residual=False), backend)


@pytest.mark.only("cuda", "simt")
@pytest.mark.parametrize("C", [4096, 16392])
def test_a_gpu_with_little_shared_memory_and_no_clusters(C, device, backend, monkeypatch):
    """sm_86: 99 KB a block. Fewer rows a block, and long rows in chunks."""
    monkeypatch.setattr(cuda_configs, "kind_of", lambda device: cuda_configs.Kind(99 << 10, False))
    check("layer", make((3, C), torch.bfloat16, device, norm="layer", residual=True), backend)


def test_a_far_mean_does_not_cancel(device, backend):
    """Sums of squares would lose a variance of 1 beside a mean of 1000."""
    for C in (20000, 20001):
        inputs = {"x": draw(2, C, device=device) + 1000, "weight": torch.ones(C, device=device)}
        ours = mk.layer_norm(**inputs, backend=backend)
        wide = layer_norm_reference(**{name: value.double() for name, value in inputs.items()})
        torch.testing.assert_close(ours.double(), wide, rtol=0, atol=2e-3)


@pytest.mark.parametrize("C, after", [(33, 13), (64, 16), (8200, 16), (8200, 13)])
def test_nan_beside_the_rows_never_leaks_in(C, after, device, backend):
    plain = make((3, C), torch.float32, device, norm="layer", residual=True)
    strided = {name: fenced(value, after=after) if value.ndim == 2 else value for name, value in plain.items()}
    for values in (plain, strided):
        for value in values.values():
            value.requires_grad_()
    results = []
    for values in (plain, strided):
        y, h = mk.layer_norm(**values, backend=backend)
        seed = fenced(torch.ones_like(y), after=after) if values is strided else torch.ones_like(y)
        results.append((y, h, *torch.autograd.grad((y, h), list(values.values()), (seed, 2 * seed))))
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        if after == 16 or backend == "triton":
            assert torch.equal(one, other)
        else:  # another kernel, for rows that are not on 16 bytes
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_columns_that_are_not_contiguous(device, backend):
    inputs = make((6, 34), torch.bfloat16, device, norm="rms", residual=True)
    inputs["x"] = inputs["x"].t().contiguous().t()
    inputs["residual"] = inputs["residual"][:1].expand(6, 34)
    check("rms", inputs, backend)


@pytest.mark.parametrize("C", [65, 72])
def test_weight_gradients_repeat_bit_for_bit(C, device, backend, few_programs):
    inputs = make((50, C), torch.float32, device, norm="layer", residual=False)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    first, second = (
        torch.autograd.grad(mk.layer_norm(**leaves, backend=backend).square().sum(), list(leaves.values()))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.only("simt")
@pytest.mark.parametrize("shape", [(7, 136), (5, 8200), (5, 67)])
def test_the_order_of_threads_does_not_matter(shape, backend, few_programs):
    from megakern.kernels.cuda.module import _simt

    values = list(make(shape, torch.float32, "cpu", norm="layer", residual=True).values())
    results = []
    for schedule in ("forward", "reverse", "random:1", "pct:1", "pct:2", "pct:3"):
        _simt.set_schedule(schedule)
        try:
            leaves = [value.clone().requires_grad_() for value in values]
            y, h = mk.layer_norm(leaves[0], *leaves[1:3], residual=leaves[3], backend=backend)
            results.append((y, h, *torch.autograd.grad(y.square().sum() + h.sum(), leaves)))
        finally:
            _simt.set_schedule("forward")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm, device, backend, unguarded):
    v = make((3, 5, 7), torch.float32, device, norm=norm, residual=True)
    v = {name: value.requires_grad_() for name, value in v.items()}
    arguments = (v["x"], v["weight"], v.get("bias"), v["residual"], 1e-5, norm == "layer", backend)
    library.opcheck(torch.ops.megakern.norm.default, arguments)


def test_compiles_in_one_graph(device, backend):
    v = make((3, 16), torch.bfloat16, device, norm="layer", residual=True)

    def both(layer_norm, rms_norm, x, weight, bias, residual):
        y, h = layer_norm(x, weight, bias, residual=residual)
        return rms_norm(y + h, weight)

    ops = [partial(op, backend=backend) for op, _ in NORMS.values()]
    ours = torch.compile(partial(both, *ops), fullgraph=True, backend="aot_eager")
    assert_gradients_close(ours, partial(both, layer_norm_reference, rms_norm_reference), v)


# --- the table of the C++ kernels ---


@pytest.mark.only("cuda", "simt")
@pytest.mark.parametrize(
    "threads, rows, cluster, message",
    [
        (48, 2, 1, "a row takes 1, 2, 4, 8, 16 or a multiple of 32 threads"),
        (32, 2, 2, "a block of a cluster one row; got 32 threads a row, 2 rows a block, clusters of 2"),
        (8, 1, 1, "threads x rows must be 32 to"),
        (1024, 2, 1, "threads x rows must be 32 to 1024, got 2048"),
        (256, 2, 1, "threads x rows must be 32 to 256, got 512"),
        (32, 1, 1, "vectors a thread must be 1 to 8, got 16"),
        (32, 1, 2, "vectors a thread must be 1 to 4, got 8"),
        (32, 1, 9, "cluster must be 1 to 8, got 9"),
    ],
)
def test_a_wrong_configuration_is_refused(threads, rows, cluster, message, device, backend):
    x, rstd = torch.ones(4, 2048, device=device), torch.ones(4, device=device)
    y, weight = torch.empty_like(x), torch.ones(2048, device=device)
    pointers = [x.data_ptr(), 0, weight.data_ptr(), 0, y.data_ptr(), 0, 0, rstd.data_ptr()]
    with pytest.raises(ValueError, match=message):
        call("norm_forward", x, *pointers, 0, 0, 4, 2048, 0, 2048, 1e-5, threads, rows, cluster)


@pytest.mark.only("simt")
def test_every_width_has_a_legal_configuration():
    """The table against the limits that csrc/norm.cu checks, for all widths up to twice the longest row on chip."""
    kinds = cuda_configs.HOPPER, cuda_configs.Kind(99 << 10, False), cuda_configs.Kind(163 << 10, False)
    for C in [*range(8, 4200, 8), *range(4200, 300_000, 1000), *(2**i for i in range(3, 19))]:
        for size, inputs, kind in ((2, 1, kinds[0]), (2, 2, kinds[1]), (4, 1, kinds[2]), (4, 2, kinds[0])):
            for choice, most, tensors in (
                (cuda_configs.norm_forward, 1024, inputs),
                (cuda_configs.norm_backward, 512, 1 + inputs),
            ):
                config = choice(C, size, inputs == 2, kind)
                if not config.threads:
                    assert C * size % 16 or C * size > 16384, f"{C} columns of {size} bytes fit on chip: {config}"
                    continue
                steps = -(-(C * size // 16) // config.cluster // config.threads)
                assert steps <= (4 if choice is cuda_configs.norm_backward or inputs == 2 or config.cluster > 1 else 8)
                for M in (1, 100, 10**6):
                    threads, rows, cluster, *persistent = config.of(M)
                    assert 32 <= threads * rows <= (256 if most == 1024 and steps <= 2 else most)
                    assert threads * rows % 32 == 0 and cluster == config.cluster
                    assert bool(persistent) == (choice is cuda_configs.norm_backward)
                    if persistent:
                        clusters, stages = persistent
                        assert clusters >= 1 and stages * tensors * steps * threads * rows * 16 <= kind.shared


@pytest.mark.only("simt")
def test_explain_tells_the_configuration(backend):
    x, weight = torch.ones(4, 4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    told = mk.explain("rms_norm", x, weight, backend=backend).reasons[backend]
    assert "forward 128 threads a row, 2 rows a block" in told and "backward 128 threads a row, 2 rows a block" in told
