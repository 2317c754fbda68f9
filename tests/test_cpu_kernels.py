"""The C++ kernels: against float64 and the composites on awkward sizes, bit for bit over threads, and their refusals.

The tests of each op also run with and without these kernels (fixture `with_and_without_cpu_kernels`).
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import megakern as mk
from megakern import doctor
from megakern.kernels.torch import activation, attention, cross_entropy, linear, native, norm
from megakern.ops.activation import KINDS, activation_reference
from megakern.ops.linear import linear_reference
from tests.closeness import assert_close_to_ref

needs_kernels = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

DTYPES = [torch.float32, torch.bfloat16]
# (M, N): smallest, one row, one lane more and less than a vector, primes, more rows than a chunk of a column sum.
SHAPES = [(1, 1), (1, 257), (3, 15), (5, 16), (7, 17), (131, 61), (523, 40)]


def draw(*shape, dtype=torch.float32, seed=0, scale=3.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def require(feature):
    if feature not in native.features():
        pytest.skip(f"this processor lacks {feature}")


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits_with_three_threads(function):
    """`function()` -> tensors; it runs with 1 thread, 1 again, and 3."""
    results = []
    for count in (1, 1, 3):
        with threads(count):
            results.append(function())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return results[0]


# --- linear ---


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["", *KINDS])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_epilogue(shape, dtype, kind, residual):
    z, bias = draw(*shape, dtype=dtype), draw(shape[1], seed=1)
    added = draw(*shape, dtype=dtype, seed=2) if residual else None

    def formula(wide):
        pre = z.to(wide) + bias.to(wide)
        y = activation_reference(pre, kind) if kind else pre
        return y if added is None else y + added.to(wide), pre

    def ours():
        pre, y = torch.empty_like(z), torch.empty_like(z)
        return native.linear_epilogue(z, bias, added, kind, y, pre), pre

    y, pre = same_bits_with_three_threads(ours)
    for name, out, reference, same in zip(["y", "pre"], (y, pre), formula(torch.float64), formula(dtype), strict=True):
        assert_close_to_ref(out, reference, same, name=name)
    in_place = z.clone()
    native.linear_epilogue(in_place, bias, added, kind, in_place)
    assert torch.equal(in_place, y), "the result depends on whether z is overwritten or the pre-activation kept"


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3000)])
def test_column_sum(shape, dtype):
    wide = draw(shape[0], shape[1] + 3, dtype=dtype)
    for x in (wide[:, : shape[1]], draw(shape[1], shape[0], dtype=dtype).t()):
        (out,) = same_bits_with_three_threads(lambda x=x: (native.column_sum(x),))
        assert_close_to_ref(out, x.double().sum(0), x.sum(0, dtype=torch.float32))


@needs_kernels
def test_linear_runs_on_the_kernels(monkeypatch):
    """Not only that they are right: that `mk.linear` calls them, and does not inside `composites_only`."""
    called = []
    for name in ("linear_epilogue", "column_sum", "activation_backward"):
        kernel = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, kernel=kernel, name=name, **k: called.append(name) or kernel(*a, **k)
        )
    x, weight, bias = draw(9, 8), draw(6, 8, seed=1), draw(6, seed=2).requires_grad_()  # fewer rows have their own

    def run():
        mk.linear(x, weight, bias, activation="silu").sum().backward()

    run()
    assert called == ["linear_epilogue", "activation_backward", "column_sum"]
    with native.composites_only():
        run()
    assert len(called) == 3


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_launcher_against_its_composite(dtype):
    x, weight, residual = draw(3, 11, 24, dtype=dtype), draw(40, 24, dtype=dtype, seed=1), draw(3, 11, 40, dtype=dtype)
    bias = draw(40, seed=2)
    wide = linear_reference(*(t.double() for t in (x, weight, bias)), activation="gelu", residual=residual.double())
    ours, _ = linear.linear_forward(x, weight, bias, residual, "gelu", False)
    with native.composites_only():
        composite, _ = linear.linear_forward(x, weight, bias, residual, "gelu", False)
    assert_close_to_ref(ours, wide, composite)


# (M, N, K): less than a tile, a tile, primes, more than one block of rows, of columns, and of the summed dimension.
PRODUCT_SHAPES = [
    (3, 5, 7),
    (32, 32, 32),
    (67, 37, 101),
    (300, 40, 1024),
    (1100, 550, 33),
    (520, 530, 290),
    (70, 480, 2050),
]


@needs_kernels
@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_product_on_tiles(shape, weight_dtype):
    """All of the epilogue, each activation with one shape; x is a view of wider rows, y and pre lie between guards."""
    require("amx_bf16")
    M, N, K = shape
    kind = ["", *KINDS][(M + N) % 5]
    x = draw(M, K + 3, dtype=torch.bfloat16, scale=1.0)[:, :K]
    weight = draw(N, K, dtype=weight_dtype, seed=1, scale=K**-0.5)
    bias, residual = draw(N, seed=2, scale=1.0), draw(M, N, seed=3, dtype=torch.bfloat16)

    def formula(dtype):
        pre = x.to(dtype) @ weight.to(torch.bfloat16).to(dtype).t() + bias.to(dtype)
        return (activation_reference(pre, kind) if kind else pre) + residual.to(dtype), pre

    def ours():
        memory = torch.full((2, M * N + 2), 7.0, dtype=torch.bfloat16)
        y, pre = (row[1:-1].view(M, N) for row in memory)
        native.product(x, weight, bias, residual, kind, y, pre)
        assert (memory[:, 0] == 7.0).all() and (memory[:, -1] == 7.0).all()
        return y, pre

    results = same_bits_with_three_threads(ours)
    for name, *values in zip(["y", "pre"], results, formula(torch.float64), formula(torch.bfloat16), strict=True):
        assert_close_to_ref(*values, name=name)
    rounded = weight.to(torch.bfloat16)
    for transposed, stored in ((False, weight), (True, weight.t().contiguous())):
        plain = torch.empty(M, N, dtype=torch.bfloat16)
        native.product(x, stored, None, None, "", plain, transposed=transposed)
        assert_close_to_ref(plain, x.double() @ rounded.double().t(), x @ rounded.t())


@needs_kernels
@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_weight_gradient_on_tiles(shape, dtype, add):
    require("amx_bf16")
    M, N, K = shape
    dy, x = draw(M, N + 1, dtype=torch.bfloat16)[:, :N], draw(M, K + 5, dtype=torch.bfloat16, seed=1)[:, 2 : K + 2]
    before = draw(N, K, dtype=dtype, seed=2)

    def ours():
        out = before.clone() if add else torch.full_like(before, torch.nan)
        return out, native.weight_gradient(dy, x, out, add, with_sums=True)

    out, sums = same_bits_with_three_threads(ours)
    reference = dy.double().t() @ x.double() + (before.double() if add else 0)
    same = (dy.float().t() @ x.float() + (before.float() if add else 0)).to(dtype)
    assert_close_to_ref(out, reference, same, name="dweight")
    assert_close_to_ref(sums, dy.double().sum(0), dy.sum(0, dtype=torch.float32), name="sums")
    assert native.weight_gradient(dy, x, out, add, with_sums=False) is None


@needs_kernels
def test_products_do_not_hide_nan():
    """And read nothing else: beside the rows of x lies NaN, which zeros of the padding would not make harmless."""
    require("amx_bf16")
    wide = torch.full((70, 64), torch.nan, dtype=torch.bfloat16)
    wide[:, :40] = 1.0
    x, weight = wide[:, :40], torch.ones(33, 40)
    y = native.product(x, weight, None, None, "", torch.empty(70, 33, dtype=torch.bfloat16))
    assert (y == 40.0).all()
    wide[5, 7] = torch.nan
    y = native.product(x, weight, None, None, "", y)
    assert y[5].isnan().all() and (y[:5] == 40.0).all() and (y[6:] == 40.0).all()


@needs_kernels
def test_linear_takes_tiles_and_runs_without_them(monkeypatch):
    """`mk.linear` calls the AMX kernels where there are some, not inside `without_tiles`; both are right."""
    require("amx_bf16")
    called = []
    for name in set(TILE_KERNELS):
        kernel = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, kernel=kernel, name=name, **k: called.append(name) or kernel(*a, **k)
        )
    x, weight, bias = draw(5, 16, 24, scale=1.0), draw(40, 24, seed=1, scale=0.2), draw(40, seed=2)
    dy = draw(5, 16, 40, seed=3)

    def run(dtype, wide):
        leaves = [x.to(dtype).requires_grad_(), weight.to(wide).requires_grad_(), bias.to(wide).requires_grad_()]
        y = mk.linear(*leaves, activation="gelu")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    ours = run(torch.bfloat16, torch.float32)
    assert called == TILE_KERNELS
    with native.without_tiles():
        other = run(torch.bfloat16, torch.float32)
    assert called == TILE_KERNELS
    for name, *values in zip(
        ["y", "dx", "dweight", "dbias"], ours, run(torch.float64, torch.float64), other, strict=True
    ):
        assert_close_to_ref(*values, name=name)


TILE_KERNELS = ["product", "product", "weight_gradient"]  # of y, dx, dweight


@needs_kernels
@pytest.mark.parametrize(
    "change, message",
    [
        ({"M": 0}, "M must be positive, got 0"),
        ({"K": 4097, "x_stride": 4097}, "K must be at most 4096, got 4097"),
        ({"x_stride": 3}, "the row stride of x must be at least K = 4, got 3"),
        ({"weight_dtype": 2}, r"dtype code must be 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"activation": 5}, "activation code must be 0 to 4, got 5"),
        ({"x": 0}, "the address of x is null"),
        ({"weight": 2}, "the address of weight must be a multiple of 4, got 2"),
        ({"y": 1 << 20}, "x must not be an output"),
    ],
)
def test_the_product_binding_refuses(change, message):
    require("amx_bf16")
    from megakern import _cpu

    a = {"M": 4, "K": 4, "x_stride": 4, "weight_dtype": 0, "activation": 0}
    a |= {"x": 1 << 20, "weight": 1 << 21, "y": 1 << 22}
    a |= change
    problem = _cpu.LinearProblem(a["M"], 4, a["K"], a["x_stride"], a["weight_dtype"], False, a["activation"], False, 1)
    with pytest.raises(ValueError, match=message):
        _cpu.linear(problem, a["x"], a["weight"], 0, 0, 0, a["y"])


@needs_kernels
@pytest.mark.parametrize(
    "change, message",
    [
        ({"K": 0}, "K must be positive, got 0"),
        ({"dy_stride": 3}, "row strides must be at least N and K"),
        ({"dtype": 2}, r"dtype code must be 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"out": 2}, "the address of out must be a multiple of 4, got 2"),
    ],
)
def test_the_weight_gradient_binding_refuses(change, message):
    require("amx_bf16")
    from megakern import _cpu

    a = {"K": 4, "dy_stride": 4, "dtype": 0, "out": 1 << 22} | change
    problem = _cpu.WeightGradientProblem(4, 4, a["K"], a["dy_stride"], 4, a["dtype"], False, 1)
    with pytest.raises(ValueError, match=message):
        _cpu.weight_gradient(problem, 1 << 20, 1 << 21, a["out"], 0)


# --- activation ---


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4099)])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_backward(shape, dtype, kind):
    x, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    (dx,) = same_bits_with_three_threads(lambda: (activation.activation_backward(dy, x, kind),))
    with native.composites_only():
        reference = activation.activation_backward(dy.double(), x.double(), kind)
        composite = activation.activation_backward(dy, x, kind)
    assert_close_to_ref(dx, reference, composite)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_at_the_ends_of_the_range(dtype, kind):
    """Large values overflow in no intermediate result; NaN and infinity are not hidden."""
    x = torch.tensor([-1e4, -100.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 100.0, 1e4], dtype=dtype)
    y = activation.activation_forward(x, kind)
    with native.composites_only():
        wide = activation.activation_forward(x.double(), kind)
        assert_close_to_ref(y, wide, activation.activation_forward(x, kind))
    slopes = activation.activation_backward(torch.ones_like(x), x, kind)
    wide_slopes = activation.activation_backward(torch.ones_like(x).double(), x.double(), kind)
    assert_close_to_ref(slopes, wide_slopes, wide_slopes.to(dtype))
    strange = torch.tensor([torch.nan, torch.inf], dtype=dtype)
    assert activation.activation_forward(strange, kind).tolist()[1] == torch.inf
    for out in (activation.activation_forward(strange, kind), activation.activation_backward(strange, strange, kind)):
        assert out[0].isnan()


@needs_kernels
def test_rounding_to_bf16_is_that_of_torch():
    """Every 16-bit pattern of the lower half around a tie, denormals, overflow to infinity, NaN."""
    high = torch.tensor([0x3F80, 0x3F81, 0x0001, 0x7F7F, 0x7F80, 0xFF7F, 0x8000], dtype=torch.int64)
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64)
    bits = (high[:, None] << 16 | low).flatten()
    bias = bits.to(torch.uint32).view(torch.float32)
    z = torch.zeros(1, len(bias), dtype=torch.bfloat16)
    native.linear_epilogue(z, bias, None, "", z)
    torch.testing.assert_close(z[0], bias.to(torch.bfloat16) + 0.0, rtol=0, atol=0, equal_nan=True)


# --- norm ---


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centre, bias, residual", [(True, True, True), (True, False, False), (False, False, True)])
def test_norm(shape, dtype, centre, bias, residual):
    """Both passes against float64 composites. A mean far from 0, which squares before centring would not survive."""
    x, dy = draw(*shape, dtype=dtype) + 20, draw(*shape, dtype=dtype, seed=1)
    added, dh = (draw(*shape, dtype=dtype, seed=i) if residual else None for i in (2, 3))
    weight = draw(shape[1], seed=4)
    shift = draw(shape[1], seed=5) if bias else None

    def run(dtype):
        inputs = [None if t is None else t.to(dtype) for t in (x, shift, added, dy, dh)]
        w = weight.to(torch.promote_types(dtype, torch.float32))
        y, h, mean, rstd = norm.norm_forward(inputs[0], w, inputs[1], inputs[2], 1e-5, centre)
        stored = h if residual else inputs[0]
        return y, h, mean, rstd, *norm.norm_backward(inputs[3], inputs[4], stored, w, mean, rstd, bias, centre)

    ours = same_bits_with_three_threads(lambda: run(dtype))
    with native.composites_only():
        reference, composite = run(torch.float64), run(dtype)
    # With one column rstd is 1 / sqrt(eps), and multiplies rounding errors.
    names = ["y", "h", "mean", "rstd", "dx", "dweight", "dbias"]
    for name, *results in zip(names, ours, reference, composite, strict=True):
        if not (shape[1] == 1 and name in ("dx", "dweight", "y")):
            assert_close_to_ref(*results, name=name, floor=1e-5 if dtype == torch.float32 else None)


# --- cross-entropy ---


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-2)])
def test_cross_entropy(shape, dtype, smoothing, z_loss):
    """Losses and gradients; ignored rows; logits whose rows are apart; the gradient in place and beside."""
    M, V = shape
    wide_logits = draw(M, V + 5, dtype=dtype)
    targets = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(6))
    targets[M // 2] = -100
    scale = draw(M, seed=7)
    options = (-100, smoothing, z_loss, V, cross_entropy.Shard(None, 0, V))

    def run(dtype, in_place):
        logits = wide_logits.to(dtype).clone()[:, :V]
        loss, lse = cross_entropy.row_losses(logits, targets, *options)
        out = logits if in_place else torch.empty(M, V, dtype=dtype)
        cross_entropy.write_gradient(out, scale.to(lse.dtype), logits, targets, lse, *options)
        return loss, lse, out.contiguous()

    ours = same_bits_with_three_threads(lambda: run(dtype, True))
    for a, b in zip(ours, run(dtype, False), strict=True):
        assert torch.equal(a, b)
    with native.composites_only():
        reference, composite = run(torch.float64, False), run(dtype, False)
    for name, *results in zip(["loss", "lse", "gradient"], ours, reference, composite, strict=True):
        # A loss near 0 is a difference of larger numbers; the exponentials of bf16 logits are good to 3e-6.
        assert_close_to_ref(*results, name=name, floor=1e-5 if name != "gradient" else None)


@needs_kernels
def test_a_column_outside_of_the_logits_is_refused():
    logits, column = draw(3, 7), torch.tensor([0, 7, 1])
    with pytest.raises(ValueError, match=r"column must be in \[0, 7\), got 7 in row 1"):
        native.cross_entropy_sums(logits, column, torch.empty(3), torch.empty(2, 3))


# --- attention ---

# (B, T, S, H, Hkv, D): one block of queries and of keys, one row or key more, less; primes; groups; head dims that are
# no multiple of a vector and that need each number of vectors in a product.
ATTENTION_SHAPES = [
    (1, 8, 8, 1, 1, 8),
    (2, 32, 64, 2, 1, 64),
    (1, 33, 65, 3, 3, 32),
    (1, 63, 127, 2, 2, 128),
    (2, 131, 131, 4, 2, 80),
    (1, 101, 47, 3, 1, 112),
    (1, 40, 40, 1, 1, 13),
    (1, 40, 72, 2, 1, 96),
]
PRODUCTS = [
    (torch.float32, torch.float32, "avx512"),
    (torch.bfloat16, torch.float32, "avx512"),
    (torch.bfloat16, torch.bfloat16, "avx512_bf16"),
    (torch.bfloat16, torch.bfloat16, "amx_bf16"),
]
ATTENTION_OPTIONS = [
    {},
    {"causal": False},
    {"window": (9, 0)},
    {"window": (5, 70), "causal": False},
    {"dropout_p": 0.25, "seed": 77, "dropout_offset": (3, 5)},
    {"scale": -0.2},
]


@needs_kernels
@pytest.mark.parametrize("options", ATTENTION_OPTIONS)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("dtype, product, feature", PRODUCTS)
def test_attention(monkeypatch, shape, options, dtype, product, feature):
    """Against float64 composites, whose masks and gradients test_attention.py checks; as good as fp32 or bf16 ones."""
    require(feature)
    if feature != "amx_bf16":
        monkeypatch.setattr(native, "has_tiles", lambda: False)
    monkeypatch.setattr(attention, "product_dtype", lambda dtype: dtype if dtype == torch.float64 else product)
    B, T, S, H, Hkv, D = shape
    inputs = [draw(B, T, H, D, scale=1.5), draw(B, S, Hkv, D, seed=1), draw(B, S, Hkv, D, seed=2)]
    values = [x.to(dtype) for x in inputs]
    dout = draw(B, T, H, D, seed=3).to(dtype)

    def run(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in values]
        out, lse = mk.attention(*leaves, **options, return_lse=True)
        gradients = torch.autograd.grad(out, leaves, dout.to(dtype))
        return [out.detach(), lse.masked_fill(lse == -torch.inf, -9.0), *gradients]

    ours = same_bits_with_three_threads(lambda: run(dtype))
    with native.composites_only():
        reference, composite = run(torch.float64), run(dtype)
    for name, *results in zip(["out", "lse", "dq", "dk", "dv"], ours, reference, composite, strict=True):
        # As in all flash attention, sum_j p dp is made from the rounded output: with few keys that shows.
        floor = 4e-2 if dtype == torch.bfloat16 and name in ("dq", "dk") and S < 16 else None
        assert_close_to_ref(*results, name=name, floor=floor)


@needs_kernels
def test_packed_attention_counts_samples():
    """Every sequence long enough for the kernel; the dropout mask depends on the sequence's number."""
    q, k, v, dout = (draw(51, 2, 16, seed=i, scale=1.0) for i in range(4))
    ends = torch.tensor([0, 19, 42, 51], dtype=torch.int32)
    how = {"cu_seqlens": (ends, ends), "dropout_p": 0.3, "seed": 5, "dropout_offset": (2, 1)}

    def run(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = mk.attention(*leaves, **how)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    ours = run(torch.float32)
    with native.composites_only():
        reference, composite = run(torch.float64), run(torch.float32)
    for name, *results in zip(["out", "dq", "dk", "dv"], ours, reference, composite, strict=True):
        assert_close_to_ref(*results, name=name)


@needs_kernels
def test_attention_takes_strides_and_does_not_write_beside_its_outputs():
    """Views of one fused tensor, an expanded value, a transposed key; outputs between guard elements."""
    fused = draw(2, 40, 3, 3, 24)
    q, k, v = fused.unbind(3)
    v = v[:, :, :1].expand(2, 40, 3, 24)
    k = k.transpose(1, 3).contiguous().transpose(1, 3)
    how = ((-1, 0), 0.3, 0.0, 0, 1, 0, 0)
    results = []
    for views in ((q, k, v), tuple(x.contiguous() for x in (q, k, v))):
        memory = torch.full((2 + q.numel() + 240,), 7.0)
        out, lse = memory[1 : 1 + q.numel()].view(q.shape), memory[2 + q.numel() :].view(2, 3, 40)
        native.attention_forward(*views, out, lse, torch.float32, *how)
        assert memory[0] == memory[1 + q.numel()] == 7.0
        results.append((out, lse))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_hide_nan(dtype):
    q, k, v = (draw(1, 16, 1, 32, seed=i, scale=1.0).to(dtype) for i in range(3))
    k[0, 5, 0, 0] = torch.nan
    out = mk.attention(q, k, v)
    assert out[0, 5:].isnan().all() and not out[0, :5].isnan().any()


@needs_kernels
@pytest.mark.parametrize(
    "change, message",
    [
        ({"T": 0}, "T must be positive, got 0"),
        ({"Hkv": 2}, "Hkv = 2 must divide H = 3"),
        ({"D": 513}, "D must be at most 512, got 513"),
        ({"S": 1 << 31}, r"T and S must be below 2\^30"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
        ({"q": 0}, "the address of q is null"),
        ({"k": 6}, "the address of k must be a multiple of 4"),
        ({"stride": -1}, "strides of q must not be negative"),
        ({"out": 1 << 20}, "out must not be an input"),
        ({"product": 1}, "products in bf16 need bf16 tensors"),
    ],
)
def test_the_attention_binding_refuses(change, message):
    from megakern import _cpu

    a = {"B": 1, "T": 4, "S": 4, "H": 3, "Hkv": 3, "D": 8, "dropout_p": 0.0, "q": 1 << 20, "k": 1 << 21, "v": 1 << 22}
    a |= {"stride": 24, "out": 1 << 23, "lse": 1 << 24, "product": 0} | change
    sizes = [a[name] for name in ("B", "T", "S", "H", "Hkv", "D")]
    problem = _cpu.AttentionProblem(*sizes, -1, 0, 1.0, a["dropout_p"], 0, 1, 0, 0, 1)
    q, k, v = (_cpu.AttentionTensor(a[name], 96, a["stride"], 8) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        _cpu.attention_forward(problem, _cpu.AttentionForward(q, k, v, a["out"], a["lse"]), 0, a["product"])


# --- what they refuse ---


@needs_kernels
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": 7}, r"dtype code must be 0 \(fp32\) or 1 \(bf16\), got 7"),
        ({"z": 0}, "the address of z is null"),
        ({"z": 2}, "the address of z must be a multiple of 4, got 2"),
        ({"y": 1 << 20}, "z and y overlap in part"),
        ({"M": 0}, "M must be positive, got 0"),
        ({"N": -3}, "N must be positive, got -3"),
        ({"M": 1 << 40, "N": 1 << 40}, "are more than an address can reach"),
        ({"activation": 9}, "activation code must be 0 to 4, got 9"),
        ({"threads": 0}, "threads must be positive, got 0"),
    ],
)
def test_the_binding_refuses(change, message):
    """Nothing is read or written: the addresses are none of ours."""
    from megakern import _cpu

    names = ("z", "bias", "residual", "pre", "y", "dtype", "activation", "M", "N", "threads")
    arguments = dict(zip(names, ((1 << 20) + 8, 0, 0, 0, 1 << 30, 0, 0, 4, 4, 1), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        _cpu.linear_epilogue(*arguments.values())


def test_what_they_do_not_take():
    assert not native.takes(torch.zeros(2, dtype=torch.float64))
    assert not native.takes(torch.zeros(2, dtype=torch.float16))
    assert not native.takes(torch.zeros(0))
    assert not native.takes(torch.zeros(2, device="meta"))
    assert not native.takes(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    assert native.takes(torch.zeros(2), None) == (native.unavailable() is None)


# --- what the user is told ---


def test_doctor_says_what_is_there(monkeypatch):
    monkeypatch.setattr(doctor.machine, "matmul_rate", lambda *arguments: 1.0)
    (line,) = [line for line in doctor.report().splitlines() if line.strip().startswith("torch on CPUs")]
    wanted = native.unavailable() or ", ".join(native.features())
    assert wanted in line
    monkeypatch.setenv("MEGAKERN_SHARED_MEMORY", "0")
    assert "\n  shared memory no: MEGAKERN_SHARED_MEMORY=0 asks for gloo\n" in doctor.report()


def test_a_missing_module_and_a_lesser_processor_are_named(monkeypatch):
    monkeypatch.setattr(native, "features", lambda: ())
    monkeypatch.setattr(native, "_cpu", object())
    assert native.describe() == "no C++ kernels: this processor lacks AVX-512 (F, BW, DQ, VL)"
    monkeypatch.setattr(native, "_cpu", None)
    assert "install g++ and the Python headers, then install megakern again" in native.describe()
    assert not native.takes(torch.zeros(2))
