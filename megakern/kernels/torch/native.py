"""The C++ kernels of the `torch` backend: is `megakern._cpu` there, what can this processor run, and one call a kernel.

`csrc/cpu/` holds the sources. The module is optional: without it, without AVX-512, and for what a kernel does not take
(other dtypes and devices), the launchers use their PyTorch composites. A call passes addresses, so tensors must be
contiguous here; C++ checks addresses, alignment and sizes again. Results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch  # first, so that the extension shares its OpenMP library
from torch._subclasses.fake_tensor import is_fake

INTERFACE = 5  # kInterface in csrc/cpu/api.h

try:
    from megakern import _cpu
except ImportError as error:
    _cpu, _import_error = None, str(error)
else:
    _import_error = ""
    if getattr(_cpu, "interface", 1) != INTERFACE:
        _cpu, _import_error = None, "it was built from other sources than those of this package"

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MASTERS = {None: 0, torch.float32: 1, torch.int16: 2}  # enum Master of csrc/cpu/api.h
ACTIVATIONS = {"": 0, "gelu": 1, "gelu_tanh": 2, "relu_squared": 3, "silu": 4}

LARGEST_HEAD = 512  # head dim; kLargestHead in csrc/cpu/attention.cpp
FEWEST_PRODUCT_ROWS = 64  # below, packing the weight costs more than the product
SMALL = 1 << 14  # elements that one thread works off in the few us that two take to meet
MOST_STREAMED_ROWS = 8  # kMostRows in csrc/cpu/rows.h
LARGEST_STEP_HEAD = 256  # head dim; kMostVecs in csrc/cpu/block_step.cpp
HUGE_PAGE = 1 << 21  # bytes
DEEPEST_PRODUCT = 4096  # kDeepest in csrc/cpu/linear_amx.cpp
LARGEST_PRODUCT_WEIGHT, DEEPEST_WITH_LARGER_WEIGHT = 3 << 18, 768  # elements (1.5 MB of L2); K
FEWEST_ROWS = 8  # of q: with fewer, most of a tile of 32 queries would be padding

# How attention makes its products; csrc/cpu/attention.h.
IN_FP32, IN_BF16, IN_TILES_OF_BF16 = 0, 1, 2

_switched_off = False
_without_tiles = False


@functools.cache
def features() -> tuple[str, ...]:
    """Instruction sets of this processor that kernels use; empty without the module."""
    return tuple(_cpu.features()) if _cpu is not None else ()


def unavailable() -> str | None:
    """Why no C++ kernel can run on this machine, or None."""
    if _cpu is None:
        return (
            f"megakern._cpu does not load ({_import_error}); install g++ and the Python headers, then install megakern "
            f"again (pip install -v shows why a build fails)"
        )
    return None if "avx512" in features() else "this processor lacks AVX-512 (F, BW, DQ, VL)"


@contextmanager
def composites_only() -> Iterator[None]:
    """Within the block all launchers use their PyTorch composites. For tests and comparisons."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


@contextmanager
def without_tiles() -> Iterator[None]:
    """Within the block launchers do as on a processor without AMX. For tests and comparisons."""
    global _without_tiles
    before, _without_tiles = _without_tiles, True
    try:
        yield
    finally:
        _without_tiles = before


def has_tiles() -> bool:
    """May kernels use AMX?"""
    return "amx_bf16" in features() and not _without_tiles


def takes(*tensors: torch.Tensor | None) -> bool:
    """May elementwise kernels read and write these (None is left out): CPU tensors, not empty, all fp32 or all bf16."""
    if _switched_off or unavailable() is not None:
        return False
    present = [t for t in tensors if t is not None]
    first = present[0]
    return first.dtype in DTYPES and all(
        t.dtype == first.dtype and t.device.type == "cpu" and t.numel() > 0 and not t.is_neg() for t in present
    )


def _address(tensor: torch.Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), "C++ kernels take contiguous tensors here"
    return tensor.data_ptr()


def _threads(elements: int) -> int:
    """Threads for a kernel that reads so many elements: one where waking the others takes longer than the work."""
    return torch.get_num_threads() if elements > SMALL else 1


def linear_epilogue(z, bias, residual, activation: str, y, pre=None):
    """y = act(z + bias) + residual; with `pre`, also pre = z + bias. z, residual, pre, y: (M, N); bias (N,) or None."""
    M, N = z.shape
    bias = None if bias is None else bias.float().contiguous()
    residual = None if residual is None else residual.contiguous()
    _cpu.linear_epilogue(
        *(_address(t) for t in (z, bias, residual, pre, y)),
        DTYPES[z.dtype],
        ACTIVATIONS[activation],
        M,
        N,
        torch.get_num_threads(),
    )
    return y


def takes_product(x, weight, residual, activation: str = "", transposed: bool = False) -> bool:
    """Does the AMX kernel compute act(x w^T + bias) + residual for bf16 x (2-D) faster than oneDNN and the epilogue?

    transposed: weight is (K, N). ms of two Xeon cores, in brackets oneDNN's with the weight's cast and a pass for bias
    and activation. 3072 rows, (N, K): (1152, 384) 0.94 (1.14), gelu (1536, 384) 1.72 (2.30), (384, 1536) 1.30 (1.75);
    transposed (384, 1536) 1.28 (1.50), (1536, 384) 1.33 (1.28). Weights that leave L2, 2048 rows: (2304, 768) 2.99
    (3.06), (768, 3072) 4.67 (4.75), gelu (3072, 768) 4.78 (5.69), transposed (3072, 768) 4.52 (3.53).
    """
    M, K = x.shape
    if M < FEWEST_PRODUCT_ROWS or K > DEEPEST_PRODUCT or not has_tiles():
        return False
    one_pass_less = activation and not transposed and K <= DEEPEST_WITH_LARGER_WEIGHT
    pays = weight.numel() <= LARGEST_PRODUCT_WEIGHT or one_pass_less
    return bool(pays) and x.dtype == torch.bfloat16 and takes(weight) and takes(x, residual)


def product(x, weight, bias, residual, activation: str, y, pre=None, transposed=False, derivative=False):
    """y = act(x w^T + bias) + residual; with `pre`, also pre = x w^T + bias. x (M, K) bf16, w (N, K) bf16 or fp32.

    transposed: w is (K, N), and y = act(x w + bias) + residual. derivative: y = act'(pre) (x w^T), of a pre that is
    read, contiguous like y, without bias and residual.
    """
    x, weight = _dense_rows(x), weight.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    residual = None if residual is None else residual.contiguous()
    sizes = (*x.shape[:1], *(weight.shape[::-1] if transposed else weight.shape), _rows_apart(x))
    how = (DTYPES[weight.dtype], transposed, ACTIVATIONS[activation], derivative, torch.get_num_threads())
    problem = _cpu.LinearProblem(*sizes, *how)
    _cpu.linear(problem, x.data_ptr(), *(_address(t) for t in (weight, bias, residual, pre, y)))
    return y


def takes_few_rows(x, weight, bias, residual) -> bool:
    """May the kernel for few rows compute act(x w^T + bias) + residual, x (M, K)? It reads the weight as it lies."""
    if x.shape[0] > MOST_STREAMED_ROWS or weight.device.type != "cpu" or not weight.is_contiguous():
        return False
    fits = all(t is None or t.dtype == x.dtype or t.dtype == torch.float32 for t in (weight, bias))
    return fits and takes(x, residual)


def few_rows(x, weight, bias, residual, activation: str, y, pre=None):
    """y (M, N) = act(x w^T + bias) + residual for few rows, and pre like `product`; w and bias of x's dtype or fp32."""
    x = _dense_rows(x)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    dtypes = [DTYPES[t.dtype] for t in (x, weight, x if bias is None else bias)]
    how = (_rows_apart(x), *dtypes, ACTIVATIONS[activation], _threads(weight.numel()))
    problem = _cpu.LinearRowsProblem(x.shape[0], *weight.shape, *how)
    _cpu.linear_rows(problem, x.data_ptr(), *(_address(t) for t in (weight, bias, residual, pre, y)))
    return y


def takes_weight_gradient(dy, x, dtype: torch.dtype) -> bool:
    """May the AMX kernel make dy^T x (2-D) in `dtype`?"""
    return has_tiles() and dy.dtype == torch.bfloat16 and dtype in DTYPES and takes(dy, x)


def weight_gradient(dy, x, out, add: bool, with_sums: bool) -> torch.Tensor | None:
    """out (N, K) = dy^T x, or += with `add`; dy (M, N), x (M, K) -> the sums over rows of dy, fp32 (N,), if wanted."""
    dy, x = _dense_rows(dy), _dense_rows(x)
    sums = torch.empty(dy.shape[1], dtype=torch.float32) if with_sums else None
    sizes = (*dy.shape, x.shape[1], _rows_apart(dy), _rows_apart(x))
    problem = _cpu.WeightGradientProblem(*sizes, DTYPES[out.dtype], add, torch.get_num_threads())
    _cpu.weight_gradient(problem, dy.data_ptr(), x.data_ptr(), _address(out), _address(sums))
    return sums


def column_sum(x) -> torch.Tensor:
    """x (M, N), any stride between rows -> fp32 (N,)."""
    x = _dense_rows(x)
    out = torch.empty(x.shape[1], dtype=torch.float32)
    stride, threads = _rows_apart(x), torch.get_num_threads()
    _cpu.column_sum(x.data_ptr(), _address(out), DTYPES[x.dtype], *x.shape, stride, threads)
    return out


def activation_forward(x, activation: str, y):
    """y = act(x), any shape; y may be x."""
    x = x.contiguous()
    return linear_epilogue(x.view(1, -1), None, None, activation, y.view(1, -1)).view(y.shape)


def activation_backward(dy, x, activation: str, dx):
    """dx = dy act'(x), any shape."""
    dy, x = dy.contiguous(), x.contiguous()
    addresses = (_address(t) for t in (dy, x, dx))
    _cpu.activation_backward(*addresses, DTYPES[x.dtype], ACTIVATIONS[activation], x.numel(), torch.get_num_threads())
    return dx


def _rows_apart(x) -> int:
    """Elements from one row of x (M, N) to the next."""
    return x.shape[1] if x.shape[0] == 1 else x.stride(0)


def _dense_rows(x):
    """x (M, N) with elements of a row side by side."""
    return x if x.stride(1) == 1 and _rows_apart(x) >= x.shape[1] else x.contiguous()


def cross_entropy_sums(logits, column, peak, sums) -> None:
    """Fill peak (M,) and sums (2 or 3, M), fp32, as `row_losses` has them. logits (M, V), column (M,) int64."""
    logits = _dense_rows(logits)
    _cpu.cross_entropy_sums(
        logits.data_ptr(),
        _address(column.contiguous()),
        _address(peak),
        *(_address(row) for row in sums),
        *([0] if len(sums) == 2 else []),
        DTYPES[logits.dtype],
        *logits.shape,
        _rows_apart(logits),
        torch.get_num_threads(),
    )


def cross_entropy_gradient(logits, column, lse, factor, uniform, at_target, out) -> None:
    """out (M, V) = factor exp(logits - lse) - uniform, plus at_target at each row's column. out may be logits."""
    if out.stride(1) != 1 or _rows_apart(out) < out.shape[1]:
        dense = torch.empty(out.shape, dtype=out.dtype)
        cross_entropy_gradient(logits, column, lse, factor, uniform, at_target, dense)
        out.copy_(dense)
        return
    logits = _dense_rows(logits)
    M = logits.shape[0]
    by_row = (lse, factor, uniform, at_target)
    keep = [column.contiguous(), *(None if t is None else t.expand(M).float().contiguous() for t in by_row)]
    _cpu.cross_entropy_gradient(
        logits.data_ptr(),
        *(_address(t) for t in keep),
        out.data_ptr(),
        DTYPES[logits.dtype],
        *logits.shape,
        _rows_apart(logits),
        _rows_apart(out),
        torch.get_num_threads(),
    )


def norm_forward(x, residual, weight, bias, eps: float, centre: bool, h, y, mean, rstd) -> None:
    """Write y (M, C), rstd (M,), with `centre` mean (M,), with a residual h = x + residual."""
    keep = [None if t is None else t.contiguous() for t in (x, residual)]
    keep += [None if t is None else t.float().contiguous() for t in (weight, bias)]
    _cpu.norm_forward(
        *(_address(t) for t in (*keep, h, y, mean, rstd)),
        DTYPES[x.dtype],
        *y.shape,
        eps,
        centre,
        torch.get_num_threads(),
    )


def norm_backward(dy, dh, h, weight, mean, rstd, dx, dweight, dbias, centre: bool) -> None:
    """Write dx (M, C) with dh added, and fp32 dweight, dbias (C,); dbias may be None."""
    keep = [None if t is None else t.contiguous() for t in (dy, dh, h, weight.float(), mean, rstd)]
    _cpu.norm_backward(
        *(_address(t) for t in (*keep, dx, dweight, dbias)),
        DTYPES[dy.dtype],
        *dx.shape,
        centre,
        torch.get_num_threads(),
    )


def takes_many(*lists, masters=()) -> bool:
    """May the kernels over many tensors read and write these: CPU tensors, fp32 or bf16 (masters: fp32 or int16)?"""
    if _switched_off or unavailable() is not None:
        return False
    tensors = [t for each in lists for t in each]
    fit = {t.dtype for t in tensors} <= DTYPES.keys() and {t.dtype for t in masters} <= MASTERS.keys()
    return fit and all(t.is_cpu and not t.is_neg() for t in tensors)


def adamw(groups, grad_scale: float, zero_grads: bool, rates) -> None:
    """One step in place. groups: those of `contiguous_rows`; rates: those of `factors`."""
    for (param, grad, moment, _, *master), rows in groups.items():
        absent = [] if master else [0]
        codes = (*(DTYPES[dtype] for dtype in (param, grad, moment)), MASTERS[master[0] if master else None])
        tensors = [_cpu.AdamwTensors(*map(_address, row), *absent, row[0].numel()) for row in rows]
        _cpu.adamw(_cpu.AdamwProblem(*codes, grad_scale, *rates, zero_grads, torch.get_num_threads()), tensors)


def sum_of_squares(tensors) -> float:
    """Of all elements of all tensors, summed in fp64."""
    keep = [t.contiguous() for t in tensors if t.numel() > 0]
    entries = [_cpu.Elements(_address(t), t.numel(), DTYPES[t.dtype]) for t in keep]
    return _cpu.sum_of_squares(entries, torch.get_num_threads())


def takes_attention(q, k, v, product: torch.dtype, softcap: float) -> bool:
    """May the attention kernels compute this, with matrix products in `product`?"""
    if softcap or q.shape[-1] > LARGEST_HEAD or q.shape[1] < FEWEST_ROWS:
        return False
    return takes(q, k, v) and (product != torch.bfloat16 or "avx512_bf16" in features())


def _products(dtype: torch.dtype) -> int:
    if dtype == torch.float32:
        return IN_FP32
    return IN_TILES_OF_BF16 if has_tiles() else IN_BF16


def _attention_problem(q, k, window, scale, dropout_p, threshold, seed, first_sample, first_head):
    B, T, H, D = q.shape
    S, Hkv = k.shape[1:3]
    left, right = window
    sizes = (B, T, S, H, Hkv, D, left, right)
    return _cpu.AttentionProblem(
        *sizes, scale, dropout_p, threshold, seed, first_sample, first_head, torch.get_num_threads()
    )


def _attention_input(x, keep: list):
    """A strided input; what had to be copied is appended to `keep`, so that it lives as long as the call."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
        keep.append(x)
    return _cpu.AttentionTensor(x.data_ptr(), *x.stride()[:3])


def attention_forward(q, k, v, out, lse, product: torch.dtype, *how) -> None:
    """Write out (B, T, H, D) and lse (B, H, T), contiguous. how: window (negative: no limit), scale, dropout_p,
    threshold, seed, first sample, first head."""
    keep = []
    tensors = _cpu.AttentionForward(*(_attention_input(x, keep) for x in (q, k, v)), _address(out), _address(lse))
    _cpu.attention_forward(_attention_problem(q, k, *how), tensors, DTYPES[q.dtype], _products(product))


def attention_backward(dout, q, k, v, out, lse, dq, dk, dv, product: torch.dtype, *how) -> None:
    """Write dq, dk, dv, of any strides whose last is 1. `how` as in attention_forward."""
    keep = [lse.contiguous()]
    tensors = _cpu.AttentionBackward(
        *(_attention_input(x, keep) for x in (dout, q, k, v, out)),
        _address(keep[0]),
        *(_cpu.AttentionTensor(x.data_ptr(), *x.stride()[:3]) for x in (dq, dk, dv)),
    )
    _cpu.attention_backward(_attention_problem(q, k, *how), tensors, DTYPES[q.dtype], _products(product))


class PreparedBlock:
    """A block's weights and pages as the kernel `block_step` takes them, once for many calls."""

    def __init__(self, weights, keys, values) -> None:
        w = weights
        self._parts = (*weights.tensors(), keys, values)
        self._places = [None if t is None else t.data_ptr() for t in self._parts]
        norms = [
            _cpu.BlockNorm(*map(_address, each or (None, None))) for each in (w.norm1, w.norm2, w.q_norm, w.k_norm)
        ]
        linears = [
            _cpu.BlockLinear(*map(_address, each or (None, None))) for each in (w.qkv, w.proj, w.fc1, w.up, w.fc2)
        ]
        self._weights = _cpu.BlockWeights(*norms, *linears)
        window = -1 if w.window is None else w.window
        kind = (w.centre, w.norm2 is None, w.up is not None, ACTIVATIONS[w.activation], window, w.eps, w.head_eps)
        C, F = w.fc2[0].shape
        self._shape = (C, w.heads, w.kv_heads, w.head_dim, F, *kind)
        self._pages = (keys.data_ptr(), values.data_ptr()), keys.shape[:2]
        self.dtypes = (DTYPES[keys.dtype], DTYPES[w.qkv[0].dtype])

    def holds(self, weights, keys, values) -> bool:
        """Are these the tensors it was made of, where they lay?"""
        parts = (*weights.tensors(), keys, values)
        return all(
            a is b and (a is None or a.data_ptr() == place)
            for a, b, place in zip(parts, self._parts, self._places, strict=True)
        )

    def run(self, hidden, block_table, lengths, rope, out) -> None:
        """out (B, T, C) = block(hidden), new keys and values into the pages: megakern/ops/block_step.py."""
        addresses, sizes = self._pages
        where = _cpu.BlockCache(*addresses, _address(block_table), _address(lengths), *sizes, block_table.shape[1])
        cos, sin = rope or (None, None)
        tables = _cpu.BlockRope(_address(cos), _address(sin), 0 if cos is None else cos.shape[0])
        shape = _cpu.BlockShape(*hidden.shape[:2], *self._shape)
        places = (_address(hidden), _address(out), *self.dtypes, torch.get_num_threads())
        _cpu.block_step(shape, self._weights, where, tables, *places)


def prepared_block(weights, keys, values) -> PreparedBlock | None:
    """For a BlockWeights of ops/block_step.py and pages (pages, page_size, G, D); None: the kernel cannot take it."""
    dtype = weights.qkv[0].dtype
    plain = (torch.Tensor, torch.nn.Parameter)  # no DTensor
    present = [t for t in weights.tensors() if t is not None]
    if weights.head_dim > LARGEST_STEP_HEAD or not takes(keys, values) or dtype not in (torch.float32, keys.dtype):
        return None
    fits = all(type(t) in plain and t.dtype == dtype and t.device.type == "cpu" for t in present)
    fits = fits and all(t.is_contiguous() for t in (*present, keys, values))
    return PreparedBlock(weights, keys, values) if fits else None


def takes_step(hidden) -> bool:
    """Has hidden (B, T, C) so few tokens that one kernel makes a block?"""
    B, T, _ = hidden.shape
    return 0 < B * T <= MOST_STREAMED_ROWS and hidden.is_contiguous() and takes(hidden)


def use_huge_pages(tensors) -> bool:
    """Large tensors of a CPU, not written yet, will lie in pages of 2 MB. -> will all of them?

    Reading 500 MB of weights, two cores of a Xeon: 31 GB/s, with pages of 4 KB 20.
    """
    on_cpu = (t for t in tensors if t.device.type == "cpu" and not is_fake(t))
    large = [t for t in on_cpu if t.is_contiguous() and t.nbytes >= HUGE_PAGE]
    return _cpu is not None and all([_cpu.use_huge_pages(t.data_ptr(), t.nbytes) for t in large])


def describe() -> str:
    """One line for `megakern doctor` and the end of `make setup`."""
    reason = unavailable()
    return f"C++ kernels, for {', '.join(features())}" if reason is None else f"no C++ kernels: {reason}"


if __name__ == "__main__":
    print(f"megakern on CPUs: {describe()}")
