"""Which public ops the C++ kernels compute, and what they refuse: one table for the `cuda` and `simt` backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from megakern.kernels.constant import constant_result

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """What the C++ kernels say of one public op."""

    describe: str | Callable[..., str]
    """How it is computed, or a function of the problem that says so, for `mk.explain`."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    most: dict[str, int] = field(default_factory=dict)
    """The largest value of each limited size of a problem."""
    refusal: Callable[..., str | None] = field(default=lambda problem: None)
    """Any other reason not to compute a problem."""
    unfit: Callable[[], str | None] = field(default=lambda: None)
    """Why the GPU in use cannot run the kernel: asked before all else, as no other dtype or size would help."""


_ELEMENTWISE = Op("16 bytes a thread and tensor at a time, where addresses and strides allow")

_TENSORS = Op(
    "all tensors in one launch, their addresses in its arguments; 16 bytes of fp32 a thread and tensor at a time"
)


def _cross_entropy(problem) -> str:
    if not problem.options["in_place"] or problem.options["ranks"] > 1:
        return "forward and backward: 16 bytes a thread at a time, one block a row forward, several backward"
    from megakern.kernels.cuda.cross_entropy import plan_for  # which loads the compiled modules

    device = torch.device(problem.device)
    return str(plan_for(problem.sizes["M"], problem.sizes["V"], problem.dtype.itemsize, device))


def _linear(problem) -> str | None:
    for name in ("N", "K"):
        if problem.sizes[name] % 8:
            what = f"{name} must be a multiple of 8, got {problem.sizes[name]}"
            return f"its C++ kernel copies rows of whole 16 bytes, so {what}"
    return None


@constant_result
def _not_hopper() -> str | None:
    from megakern.kernels.cuda.module import _C

    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"its C++ kernel is for sm_90a alone (TMA and wgmma), this GPU is sm_{capability[0]}{capability[1]}"
    if "sm_90a" not in _C.built:
        return f"its C++ kernel is for sm_90a, and megakern._C was built {_C.built}"
    return None


def _linear_plan(problem) -> str:
    from megakern.kernels.cuda.linear_plan import NT, epilogue_weight  # which loads the compiled modules

    weight = epilogue_weight(**{name: bool(problem.options[name]) for name in ("activation", "bias", "residual")})
    return f"{_PRODUCT}; x W^T in {_plan(problem, NT, 1, weight)}; backward: the bias gradient from what dy^T x reads"


def _linear_swiglu_plan(problem) -> str:
    from megakern.kernels.cuda.linear_plan import GATED, epilogue_weight

    weight = epilogue_weight(activation=True, bias=problem.options["bias"])
    plan = _plan(problem, GATED, 2, weight)
    return f"{_PRODUCT}; both products of x at once, silu(gate) * up in their epilogue, in {plan}"


_PRODUCT = "TMA and wgmma, warp-specialised, persistent blocks"


def _plan(problem, layout: int, weights: int, epilogue: float) -> str:
    from megakern.kernels.cuda.linear import multiprocessors
    from megakern.kernels.cuda.linear_plan import choose

    M, N, K = (problem.sizes[name] for name in "MNK")
    return str(choose(M, weights * N, K, multiprocessors(torch.device(problem.device)), layout, epilogue))


def loss_products_refusal(device: str, dtype: torch.dtype, M: int, V: int, K: int) -> str | None:
    """Why the products of linear_cross_entropy are PyTorch's, or None: they are those of `linear`, with rows of logits
    (M, V) padded to whole 16 bytes."""
    sizes = {"M": M, "N": -(-V // 8) * 8, "K": K}
    return refusal(SimpleNamespace(op="linear", device=device, dtype=dtype, sizes=sizes))


def _linear_cross_entropy_plan(problem) -> str:
    from megakern.kernels.torch.linear_cross_entropy import chunk_rows

    M, V, K = (problem.sizes[name] for name in "MVK")
    loss = "the loss as cross_entropy with in_place"
    refused = loss_products_refusal(problem.device, problem.dtype, M, V, K)
    if refused:
        return f"matrix products by PyTorch (linear: {refused}); {loss}"
    from megakern.kernels.cuda.linear_plan import NT

    rows = min(M, chunk_rows(V, problem.dtype.itemsize, problem.device))
    chunk = replace(problem, sizes={"M": rows, "N": V, "K": K})
    return f"{_PRODUCT}; x W^T of {rows} rows in {_plan(chunk, NT, 1, 0.0)}; dW added up in fp32; {loss}"


def _norm(problem) -> str:
    from megakern.kernels.cuda.configs import describe_norm  # which loads the compiled modules

    return describe_norm(problem)


_NORM = Op(_norm, most={"C": 2**31 - 1})


def _attention(problem) -> str | None:
    return _head_dim(problem) or _no_keys(problem, "S")


def _head_dim(problem) -> str | None:
    D = problem.sizes["D"]
    return f"its C++ kernel is for head dims that are multiples of 8 up to 256, got {D}" if D % 8 or D > 256 else None


def _no_keys(problem, name: str) -> str | None:
    some = problem.sizes[name] and problem.sizes["T"]
    return None if some else "its C++ kernel wants at least one query and one key"


def _paged_attention(problem) -> str | None:
    from megakern.kernels.cuda.attention_decode import FEW_ROWS  # which loads the compiled modules

    rows = problem.sizes["T"] * (problem.sizes["H"] // problem.sizes["Hkv"])
    if rows > FEW_ROWS:
        return f"its C++ kernel is for up to {FEW_ROWS} rows (queries x query heads of a key-value head), got {rows}"
    if problem.sizes["P"] * problem.sizes["page_size"] > 1 << 28:
        return f"its C++ kernel takes up to {1 << 28} keys"
    return _head_dim(problem) or _no_keys(problem, "P")


@constant_result
def _small_block() -> str | None:
    from megakern.kernels.cuda.configs import kind_of

    shared, wanted = kind_of(torch.cuda.current_device()).shared, 163 << 10
    return None if shared >= wanted else f"its C++ kernel wants {wanted} bytes of shared memory, this GPU has {shared}"


def _attention_tile(problem) -> str:
    from megakern.kernels.cuda.attention import pairs_for, tile_for  # which loads the compiled modules
    from megakern.kernels.cuda.attention_decode import decodes

    D, T, H, Hkv = (problem.sizes[name] for name in ("D", "T", "H", "Hkv"))
    plain = problem.options["positive_scale"] and not any(problem.options[name] for name in _FEATURES)
    tile = tile_for(D, T, plain)
    pairs = pairs_for(D, T, H, Hkv, tile, _sees_all(problem))
    forward = f"TMA and wgmma, {tile}, consumer warpgroups in turn, persistent {pairs}"
    few = decodes(T, H // Hkv, problem.options["packed"], problem.options["dropout"])
    return f"forward: {_DECODE if few else forward}; {_attention_backward(problem)}"


_FEATURES = ("softcap", "alibi", "dropout")
_DECODE = "keys split over blocks, 16 rows of a group each, cp.async and mma; a second kernel combines"


def _sees_all(problem) -> bool:
    """Does each query see each key, in sequences of one length?"""
    limited = any(side is not None for side in problem.options["window"] or ())
    return not (limited or problem.options["causal"] or problem.options["packed"])


def _attention_backward(problem) -> str:
    from megakern.kernels.cuda.attention_backward import tile_for  # which loads the compiled modules

    plain = not any(problem.options[name] for name in _FEATURES)
    tile = tile_for(problem.sizes["D"], problem.sizes["T"], plain, _sees_all(problem))
    order = "in the order of the keys" if problem.options["deterministic"] else "in any order"
    return f"backward with TMA and wgmma, {tile}, dk and dv in registers, dq added to fp32 sums {order}"


OPS: dict[str, Op] = {
    "AdamW": _TENSORS,
    "attention": Op(
        _attention_tile,
        dtypes=(torch.bfloat16, torch.float16),
        refusal=_attention,
        unfit=_not_hopper,
    ),
    "clip_grad_norm_": _TENSORS,
    "cross_entropy": Op(_cross_entropy, most={"V": 2**31 - 1}),
    "dropout": Op("two pieces of 16 bytes a thread and tensor, of one row, where addresses and strides allow"),
    "gelu": _ELEMENTWISE,
    "layer_norm": _NORM,
    "linear_cross_entropy": Op(_linear_cross_entropy_plan, most={"V": 2**31 - 1}),
    "paged_attention": Op(
        _DECODE, dtypes=(torch.bfloat16, torch.float16), refusal=_paged_attention, unfit=_small_block
    ),
    "rms_norm": _NORM,
    "rope": Op("16 bytes of both halves of two heads a thread at a time; a token's angles are read once a thread"),
    "swiglu": _ELEMENTWISE,
    "linear": Op(
        _linear_plan,
        dtypes=(torch.bfloat16, torch.float16),
        most=dict.fromkeys("MNK", 2**31 - 1024),
        refusal=_linear,
        unfit=_not_hopper,
    ),
    "linear_swiglu": Op(
        _linear_swiglu_plan,
        dtypes=(torch.bfloat16, torch.float16),
        most=dict.fromkeys("MNK", 2**30),
        refusal=_linear,
        unfit=_not_hopper,
    ),
}


def refusal(problem) -> str | None:
    """Why the C++ kernels cannot compute `problem`, on whatever device, or None."""
    op = OPS.get(problem.op)
    if op is None:
        return "there is no C++ kernel for this op in this version"
    if problem.device == "cuda" and (reason := op.unfit()):
        return reason
    if problem.dtype not in op.dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in op.dtypes)
        return f"its C++ kernels take {names}, not {problem.dtype}"
    for name, most in op.most.items():
        if problem.sizes[name] > most:
            return f"its C++ kernels take {name} up to {most}, got {problem.sizes[name]}"
    return op.refusal(problem)


def configuration(problem) -> str:
    """How `problem` is computed, for `mk.explain`."""
    describe = OPS[problem.op].describe
    return describe if isinstance(describe, str) else describe(problem)
