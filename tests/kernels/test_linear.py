"""The linear layer of every compiled backend against float64: epilogues, gradients, every tile shape.

Triton's interpreter multiplies bfloat16 matrices wrongly, so there products are tested in fp16 and fp32. The C++
kernels take bf16 and fp16, and rows of whole 16 bytes.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import library
from torch.nn import functional as F

import megakern as mk
from megakern.kernels.cuda import linear as cuda_linear
from megakern.kernels.cuda import module
from megakern.kernels.cuda.linear_plan import GATED, NN, NT, OTHER_TILES, TILES, TN, Tile, plan_of
from megakern.kernels.triton import configs
from megakern.kernels.triton.linear import product
from megakern.ops.activation import KINDS
from megakern.ops.dispatch import launcher, refusal
from megakern.ops.gradients import GradientTarget
from megakern.ops.linear import _problem, linear_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close, assert_rounded_once
from tests.kernels.conftest import BACKENDS, INTERPRETED
from tests.kernels.inputs import draw, fenced
from tests.simt import SCHEDULES

OP = "linear"
DTYPES = [torch.float32] * ("triton" in BACKENDS) + [torch.float16] + [torch.bfloat16] * (not INTERPRETED)
# (leading dims of x, N, K): smallest, primes, a tile of 64 and its neighbours, several tiles and steps, no rows.
SHAPES = [((1,), 1, 1), ((7,), 13, 5), ((2, 3), 65, 64), ((64,), 64, 63), ((130,), 70, 140), ((0,), 4, 8)]
# The same for kernels that want N and K to be multiples of 8.
SHAPES_BY_8 = [((1,), 8, 8), ((7,), 16, 24), ((2, 3), 72, 64), ((64,), 64, 56), ((130,), 136, 264), ((0,), 8, 16)]
COMPILED = [*TILES, *OTHER_TILES]
SPLIT = [tile for tile in COMPILED if tile.splits]
LAYOUTS = {"nt": NT, "nn": NN, "tn": TN}
cxx = pytest.mark.only("cuda", "simt")


def make(lead, N, K, dtype, device, *, bias=True, residual=True):
    inputs = {
        "x": draw(*lead, K, dtype=dtype, device=device),
        "weight": draw(N, K, dtype=dtype, device=device, seed=1, scale=K**-0.5),
        "bias": draw(N, device=device, seed=2),
        "residual": draw(*lead, N, dtype=dtype, device=device, seed=3),
    }
    wanted = {"x": True, "weight": True, "bias": bias, "residual": residual}
    return {name: value for name, value in inputs.items() if wanted[name]}


def check(inputs, backend, activation=None):
    ours = partial(mk.linear, activation=activation, backend=backend)
    assert_gradients_close(ours, partial(linear_reference, activation=activation), inputs)


def skip_unless(backend, dtype, N=8, K=8):
    """Skip with the backend's own reason."""
    reason = refusal(backend, _problem(torch.empty(1, K, dtype=dtype), torch.empty(N, K, dtype=dtype)))
    if backend != "triton" and reason:
        pytest.skip(reason)


def size_of(backend, triton, multiple):
    return triton if backend == "triton" else multiple


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_outputs_and_gradients(case, dtype, device, backend):
    lead, N, K = size_of(backend, SHAPES, SHAPES_BY_8)[case]
    skip_unless(backend, dtype)
    check(make(lead, N, K, dtype, device), backend)
    check(make(lead, N, K, dtype, device, bias=False, residual=False), backend, "gelu_tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", KINDS)
def test_activations_with_everything(activation, dtype, device, backend):
    skip_unless(backend, dtype)
    check(make((9,), *size_of(backend, (17, 33), (24, 40)), dtype, device), backend, activation)


@pytest.mark.parametrize("config", [*configs.LINEAR, configs.LINEAR_FP32], ids=lambda config: config.name)
@pytest.mark.only("triton")
def test_every_configuration_and_programs_with_several_tiles(config, device, monkeypatch):
    """Bands of tile rows that are not full, and fewer programs than tiles."""
    from megakern.kernels.triton import linear

    tiles = {**config.tiles, "GROUP": 2}
    chosen = configs.Config(config.name, tiles, config.warps, config.stages)
    monkeypatch.setattr(configs, "linear", lambda *arguments, **options: (chosen,))
    monkeypatch.setattr(linear, "_processors", lambda device: 4)
    M, N, K = 2 * tiles["BM"] + 3, 2 * tiles["BN"] + 5, tiles["BK"] + 7
    a, b = (draw(*s, dtype=torch.float16, device=device, seed=i) for i, s in enumerate([(M, K), (N, K)]))
    out = torch.full((M, N), float("nan"), dtype=torch.float16, device=device)
    product(a, b.t(), out)
    wide = a.double() @ b.double().t()
    assert_close_to_ref(out, wide, wide.half())


# --- the tile shapes of csrc/linear.cu ---


def multiply(layout, a, b, tile, out_dtype=None, into=None, splits=1, **more):
    """a (M, K) b (N, K)^T by the C++ kernel, from operands stored as `layout` says; out starts as NaN."""
    stored_a = a.t().contiguous() if layout == TN else a
    stored_b = b if layout in (NT, GATED) else b.t().contiguous()
    shape = (a.shape[0], b.shape[0])
    out = torch.full(shape, float("nan"), dtype=out_dtype or a.dtype, device=a.device) if into is None else into.clone()
    # 4 blocks: more tiles than blocks; bands of two tiles of a cluster.
    plan = plan_of(tile, shape[0], shape[1] * (1 + (layout == GATED)), a.shape[1], blocks=4, splits=splits)
    arguments = {"plan": plan, "blocks": 4, "band": 4 * tile.rows, "accumulate": into is not None, **more}
    cuda_linear.product(layout, stored_a, stored_b, out, **arguments)
    return out


def two(M, N, K, dtype, device):
    return (draw(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate([(M, K), (N, K)]))


@cxx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tile", COMPILED, ids=str)
def test_every_tile_shape_and_layout(tile, layout, dtype, device, backend):
    """Tiles that stick out on each side, more tiles than blocks, steps that wrap the ring; twice, for the same bits."""
    for M, N, K in [(tile.rows * 5 + 8, tile.cols * 2 + 24, 136), (tile.rows, tile.cols, 64 * 10), (8, 8, 8)]:
        a, b = two(M, N, K, dtype, device)
        out, again = (multiply(layout, a, b, tile) for _ in range(2))
        wide = a.double() @ b.double().t()
        assert_close_to_ref(out, wide, wide.to(dtype))
        assert torch.equal(out, again)
        if layout == TN:
            sums = torch.full((2, M), float("nan"), dtype=dtype, device=device)
            wide32, again = (multiply(layout, a, b, tile, torch.float32, dbias=row) for row in sums)
            assert_close_to_ref(sums[0], a.double().sum(1), a.float().sum(1).to(dtype), name="sums of rows")
            assert torch.equal(*sums) and torch.equal(wide32, again)
            assert_close_to_ref(wide32, wide, (a.float() @ b.float().t()))
            start = draw(M, N, device=device, seed=2)
            into = multiply(layout, a, b, tile, torch.float32, into=start)
            assert_close_to_ref(into, wide + start.double(), (a.float() @ b.float().t()) + start)
            narrow = (start * K**0.5).to(dtype)
            # The largest of the sums is 4 to 5 times their deviation, K^0.5.
            assert_rounded_once(multiply(layout, a, b, tile, into=narrow), wide + narrow.double(), 4 * K**0.5)


@cxx
@pytest.mark.parametrize("tile, splits", [(tile, 1) for tile in COMPILED] + [(tile, 2) for tile in SPLIT], ids=str)
def test_every_tile_shape_with_an_epilogue(tile, splits, device, backend):
    M, N, K = tile.rows + 9, (tile.cols if splits == 1 else 2 * tile.cols) + 8, 72
    a, b = two(M, N, K, torch.bfloat16, device)
    b = b / 8
    bias, residual = draw(N, device=device, seed=2).bfloat16(), draw(M, N, device=device, seed=3).bfloat16()
    pre = torch.full((M, N), float("nan"), dtype=torch.bfloat16, device=device)
    out = multiply(NT, a, b, tile, splits=splits, bias=bias, residual=residual, pre=pre, activation="gelu")
    for found, more in ((pre, {}), (out, {"activation": "gelu", "residual": residual})):
        results = []
        for wide in (torch.float64, torch.bfloat16):
            cast = {name: value.to(wide) if isinstance(value, torch.Tensor) else value for name, value in more.items()}
            results.append(linear_reference(a.to(wide), b.to(wide), bias.to(wide), **cast))
        assert_close_to_ref(found, *results)
    # Of what is kept, to the last bit: backward takes the slope there.
    assert_rounded_once(out, F.gelu(pre.double()) + residual.double(), 8)


@cxx
@pytest.mark.parametrize("layout", [NT, TN], ids=["nt", "tn"])
@pytest.mark.parametrize("tile", SPLIT, ids=str)
def test_tiles_in_parts_along_k(tile, layout, device, backend):
    """After whole tiles and alone, of 2 and 3 steps each, with other lengths of the ring for the whole ones."""
    for M, N in [(tile.rows * 2 + 8, tile.cols + 24), (8, 16)]:
        a, b = two(M, N, 64 * 7 + 8, torch.bfloat16, device)
        out, again = (multiply(layout, a, b, tile, splits=3) for _ in range(2))
        wide = a.double() @ b.double().t()
        assert_close_to_ref(out, wide, wide.bfloat16())
        assert torch.equal(out, again)
        if layout == TN:
            start, dbias = draw(M, N, device=device, seed=2), torch.full((2, M), float("nan"), device=device)
            into = [multiply(layout, a, b, tile, torch.float32, into=start, splits=3, dbias=row) for row in dbias]
            assert_close_to_ref(into[0], wide + start.double(), (a.float() @ b.float().t()) + start)
            assert_close_to_ref(dbias[0], a.double().sum(1), a.float().sum(1), name="sums of rows")
            assert torch.equal(*into) and torch.equal(*dbias)
            narrow = (20 * start).bfloat16()
            into = [multiply(layout, a, b, tile, into=narrow, splits=3, dbias=row) for row in dbias]
            assert_rounded_once(into[0], wide + narrow.double(), 20)
            assert torch.equal(*into) and torch.equal(*dbias)


@cxx
def test_whichever_part_comes_last_the_bits_are_the_same(device, backend):
    """Other numbers of blocks share the same parts out in other ways, so that others come last."""
    tile = TILES[-1]
    M, N, K = tile.rows * 3, tile.cols * 2, 64 * 5
    a, b = two(M, N, K, torch.float16, device)
    plan = plan_of(tile, M, N, K, blocks=4, splits=3)
    assert (plan.tiles, plan.whole) == (6, 4)
    first, *others = (multiply(TN, a, b, tile, torch.float32, plan=plan, blocks=blocks) for blocks in (4, 1, 3, 5, 12))
    assert_close_to_ref(first, a.double() @ b.double().t(), a.float() @ b.float().t())
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.only("simt")
@pytest.mark.parametrize("tile", COMPILED, ids=str)
def test_the_order_of_threads_does_not_matter(tile, backend):
    """A barrier too few shows under some order of the warps."""
    M, N, K = tile.rows * 3 + 8, tile.cols + 8, 64 * 9
    a, b = two(M, N, K, torch.bfloat16, "cpu")
    default = module._simt.schedule()
    try:
        results, parts = [], []
        for schedule in SCHEDULES:
            module._simt.set_schedule(schedule)
            results += [multiply(NT, a, b, tile, head_start=steps) for steps in (0, 2)]
            parts.append(multiply(NT, a[:8], b, tile, splits=4 if tile.splits else 1))
    finally:
        module._simt.set_schedule(default)
    wide = a.double() @ b.double().t()
    assert_close_to_ref(results[0], wide, wide.bfloat16())
    assert_close_to_ref(parts[0], wide[:8], wide[:8].bfloat16())
    assert all(torch.equal(results[0], result) for result in results)
    assert all(torch.equal(parts[0], part) for part in parts)


@cxx
def test_operands_that_do_not_start_on_16_bytes_are_copied(device, backend):
    field = draw(20, 64, dtype=torch.bfloat16, device=device)
    x, weight = field[:, 3:27], draw(16, 31, dtype=torch.bfloat16, device=device, seed=1)[:, 5:29]
    forward = launcher(backend, "linear", "linear_forward")
    for rows in (x, x[:1], x[:1].expand(20, 24)):
        y, pre = forward(rows, weight, None, field[: len(rows), 7:23], "", False)
        wide = rows.double() @ weight.double().t() + field[: len(rows), 7:23].double()
        assert_close_to_ref(y, wide, wide.bfloat16())
        assert pre.numel() == 0


@cxx
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(device, backend):
    def ask(N, K, dtype):
        mk.linear(
            torch.ones(2, K, dtype=dtype, device=device), torch.ones(N, K, dtype=dtype, device=device), backend=backend
        )

    with pytest.raises(ValueError, match=r"copies rows of whole 16 bytes, so N must be a multiple of 8, got 12"):
        ask(12, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"so K must be a multiple of 8, got 17"):
        ask(16, 17, torch.float16)
    with pytest.raises(ValueError, match=r"take bfloat16, float16, not torch.float32"):
        ask(16, 16, torch.float32)


@cxx
def test_the_launch_checks_its_arguments(device, backend):
    a, b = (torch.zeros(16, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    tile, long = TILES[0], [torch.cat([x] * 16, 1) for x in (a, b)]
    wrong = {
        "there is no tile of 100 x 8 in clusters of 1": lambda: multiply(NT, a, b, Tile(100, 8, 1, 1.0, 0)),
        "the rows of a must start on multiples of 16 bytes": lambda: cuda_linear.product(NT, a[:, 1:9], b[:, :8], out),
        "out is written and must not overlap a": lambda: cuda_linear.product(NT, a, b, a),
        "out must be dtype code 1, got 2": lambda: multiply(NT, a, b, tile, torch.float16),
        "out may be fp32 .* with layout 2 alone": lambda: multiply(NT, a, b, tile, torch.float32),
        "out is accumulated into with layout 2 alone": lambda: multiply(NT, a, b, tile, into=out),
        "splits must be 1 to 1, got 2": lambda: multiply(NT, a, b, SPLIT[0], splits=2),
        "this tile and layout are not split along K: splits must be 1, got 2": lambda: multiply(
            NT, *long, tile, splits=2
        ),
        "this tile and layout are not split along K: splits must be 1, got 3": lambda: multiply(
            NN, *long, SPLIT[0], splits=3
        ),
        "this tile and layout are not split along K: splits must be 1, got 4": lambda: multiply(
            GATED, *long, SPLIT[0], splits=4, b_up=long[1]
        ),
        "bias does not go with layout 2": lambda: multiply(TN, a, b, tile, torch.float32, bias=a[0]),
        "residual does not go with layout 2": lambda: multiply(TN, a, b, tile, residual=a),
        "sums does not go with layout 0": lambda: multiply(NT, a, b, tile, dbias=a[0]),
        "saved does not go with layout 0": lambda: multiply(NT, a, b, tile, saved=a),
        "b_up does not go with layout 1": lambda: multiply(NN, a, b, tile, b_up=b),
        "saved goes with an activation or saved_up": lambda: multiply(NN, a, b, tile, activation="gelu"),
        "out_up goes with saved_up": lambda: multiply(NN, a, b, tile, saved=a, saved_up=a),
        "there is no residual beside saved": lambda: multiply(NN, a, b, tile, saved=a, residual=a, activation="gelu"),
        "bias_up goes with bias": lambda: multiply(GATED, a, b, tile, b_up=a, bias=a[0]),
        "an activation goes with layouts 0 and 1 alone": lambda: multiply(GATED, a, b, tile, b_up=a, activation="gelu"),
        "a, b and with layout 3 b_up must not be null": lambda: multiply(GATED, a, b, tile),
        "layout 3 is for tiles of single blocks": lambda: multiply(GATED, a, b, OTHER_TILES[0], b_up=a),
        "layout 3 is for .* and of columns that 64 divides": lambda: multiply(
            GATED, a, b, next(tile for tile in TILES if not tile.gated), b_up=a
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=f"linear_product: {message}"):
            call()


@cxx
@pytest.mark.parametrize("M, N", [(1, 8), (70, 264), (1000, 520)])
def test_column_sums(M, N, device, backend):
    rows = draw(M, N + 8, dtype=torch.bfloat16, device=device)[:, 8:]
    gradient = launcher(backend, "linear", "linear_weight_gradient")
    for dtype in (torch.float32, torch.bfloat16):
        dweight, dbias = gradient(rows, rows, None, dtype)
        assert dweight.numel() == 0
        assert_close_to_ref(dbias, rows.double().sum(0), rows.float().sum(0).to(dtype))


@cxx
def test_explain_names_the_tile(device, backend):
    x, weight = (torch.empty(size, 64, dtype=torch.bfloat16, device=device) for size in (16, 4096))
    assert "x W^T in tiles of 64 x 128 (32, " in str(mk.explain("linear", x, weight, backend=backend))


# --- all backends again ---


def test_the_weight_gradient_is_added_in_fp32(device, backend):
    accumulate, gradient = (
        launcher(backend, "linear", f"linear_{name}") for name in ("accumulate_weight_gradient", "weight_gradient")
    )
    N, K = size_of(backend, (20, 9), (24, 16))
    dy, x = draw(300, N, dtype=torch.float16, device=device), draw(300, K, dtype=torch.float16, device=device, seed=1)
    start = draw(N, K, device=device, seed=2)
    expected = start.double() + dy.double().t() @ x.double()
    for into in (start.clone(), fenced(start), fenced(start, after=16), start.t().contiguous().t()):
        dbias = accumulate(into, dy, x, torch.float32)
        torch.testing.assert_close(into.double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1e-5, atol=1e-4)
    assert accumulate(start.clone(), dy, x, None).numel() == 0
    dweight, dbias = gradient(dy, x, torch.float32, torch.float32)
    torch.testing.assert_close(dweight.double(), expected - start.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1e-5, atol=1e-4)
    dweight, dbias = gradient(dy, dy, None, torch.float16)
    assert dweight.numel() == 0 and dbias.dtype == torch.float16
    none = gradient(dy[:0], x[:0], torch.float32, torch.float32)
    assert all(gradient.numel() and not gradient.any() for gradient in none)
    into = start.clone()
    assert not accumulate(into, dy[:0], x[:0], torch.float32).any() and torch.equal(into, start)


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (not INTERPRETED))
def test_the_weight_gradient_is_added_to_16_bits_and_rounded_once(dtype, device, backend):
    """Rows on multiples of 16 bytes, others and columns; NaN around them stays NaN. Then as the layer's gradient."""
    accumulate = launcher(backend, "linear", "linear_accumulate_weight_gradient")
    N, K = size_of(backend, (20, 9), (24, 16))
    dy, x = draw(300, N, dtype=dtype, device=device), draw(300, K, dtype=dtype, device=device, seed=1)
    start = draw(N, K, dtype=dtype, device=device, seed=2, scale=17)
    expected, results = start.double() + dy.double().t() @ x.double(), []
    for into in (start.clone(), fenced(start, after=16), fenced(start), start.t().contiguous().t()):
        results += [into, accumulate(into, dy, x, dtype)]
        assert_rounded_once(into, expected, 17)
        assert_close_to_ref(results[-1], dy.double().sum(0), dy.float().sum(0).to(dtype))
        if into._base is not None and into._base.numel() > into.numel():
            assert int(into._base.isnan().sum()) == into._base.numel() - into.numel()
    assert torch.equal(results[0], results[2])  # by the same kernel
    into = start.clone()
    assert not accumulate(into, dy[:0], x[:0], dtype).any() and torch.equal(into, start)

    weight = torch.nn.Parameter(torch.zeros_like(start))
    weight.gradient_target = GradientTarget(dtype, weight)
    weight.grad = buffer = start.clone()
    mk.linear(x, weight, backend=backend).backward(dy)
    assert weight.grad is buffer and torch.equal(buffer, results[0])


def test_nan_beside_the_operands_never_leaks_in(device, backend):
    inputs = make((10,), *size_of(backend, (30, 70), (40, 72)), torch.float16, device)
    results = []
    for values in (inputs, {name: fenced(value) if value.ndim == 2 else value for name, value in inputs.items()}):
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        y = mk.linear(**leaves, activation="silu", backend=backend)
        results.append((y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_operands_with_other_strides(device, backend):
    N, K = size_of(backend, (20, 36), (24, 40))
    inputs = make((12,), N, K, size_of(backend, torch.float32, torch.float16), device)
    inputs["x"] = inputs["x"].t().contiguous().t()
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    inputs["residual"] = inputs["residual"][:1].expand(12, N)
    check(inputs, backend, "relu_squared")


@pytest.mark.only("triton")
@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter cannot")
def test_the_interpreter_refuses_bf16_products():
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 matrices wrongly; use float16 or float32"):
        mk.linear(torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16(), backend="triton")


def test_opcheck_and_compile(device, unguarded, backend):
    v = make((3,), *size_of(backend, (5, 7), (8, 16)), size_of(backend, torch.float32, torch.float16), device)
    arguments = [value.requires_grad_() for value in v.values()]
    library.opcheck(torch.ops.megakern.linear.default, (*arguments, "gelu_tanh", True, backend))
    compiled = torch.compile(
        partial(mk.linear, activation="silu", backend=backend), fullgraph=True, backend="aot_eager"
    )
    assert_gradients_close(compiled, partial(linear_reference, activation="silu"), v)
