"""How tests compare: our error against float64 must be at most twice the error of same-precision PyTorch, plus a
floor."""

from __future__ import annotations

import torch

# Absolute floor, as a fraction of the largest reference value: a few roundings of the dtype.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close_to_ref(
    out: torch.Tensor,
    reference: torch.Tensor,
    same_precision: torch.Tensor,
    *,
    name: str = "output",
    floor: float | None = None,
) -> None:
    """max|out - reference| <= 2 x max|same_precision - reference| + floor x max|reference|.

    `reference` is float64, `same_precision` is plain PyTorch in the dtype of `out`. NaN anywhere in `out` fails.
    """
    assert out.shape == reference.shape, f"{name}: shape {tuple(out.shape)}, wanted {tuple(reference.shape)}"
    assert reference.dtype == torch.float64, f"{name}: the reference must be float64, got {reference.dtype}"
    if out.numel() == 0:
        return
    error = (out.double() - reference).abs().max().item()
    baseline = (same_precision.double() - reference).abs().max().item()
    floor = FLOOR[out.dtype] if floor is None else floor
    allowed = 2 * baseline + floor * reference.abs().max().item()
    assert error <= allowed, (
        f"{name}: error {error:.3e} > allowed {allowed:.3e} (same-precision PyTorch {baseline:.3e}, "
        f"largest value {reference.abs().max().item():.3e}, dtype {out.dtype})"
    )


def assert_rounded_once(out: torch.Tensor, exact: torch.Tensor, sums: float) -> None:
    """Each element of `out` lies at most half a step of its dtype beside float64's, and the error of fp32 sums of this
    magnitude. What was rounded before is off by more where its parts cancel."""
    off = (out.double() - exact).abs() - exact.abs() * (torch.finfo(out.dtype).eps / 2) - 1e-6 * sums
    assert bool((off <= 0).all()), f"{int((~(off <= 0)).sum())} of {off.numel()} were rounded before, or are wrong"


def assert_gradients_close(
    function, reference, inputs: dict[str, torch.Tensor | None], *, floor: float | None = None
) -> None:
    """Outputs and all input gradients of `function(**inputs)` against `reference` in float64 and in the same dtype.

    Non-floating inputs and None are passed through. Both may return a tensor or a tuple of tensors.
    """
    ours, our_gradients = _run(function, inputs, None)
    wide, wide_gradients = _run(reference, inputs, torch.float64)
    same, same_gradients = _run(reference, inputs, None)
    for i, (out, ref, base) in enumerate(zip(ours, wide, same, strict=True)):
        assert_close_to_ref(out, ref, base, name=f"output {i}", floor=floor)
    assert our_gradients.keys() == wide_gradients.keys()
    for name, gradient in our_gradients.items():
        assert_close_to_ref(
            gradient, wide_gradients[name], same_gradients[name], name=f"gradient of {name}", floor=floor
        )


def _run(function, inputs, dtype):
    leaves = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            # Through clone of the strided tensor, so that non-contiguous inputs stay so.
            leaf = value.detach().to(dtype or value.dtype)
            leaves[name] = leaf.requires_grad_()
        else:
            leaves[name] = value
    out = function(**leaves)
    outputs = tuple(o for o in (out if isinstance(out, tuple) else (out,)) if o is not None)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float32) for o in outputs]
    total = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True) if o.requires_grad)
    total.backward()
    gradients = {
        name: leaf.grad for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    }
    assert all(g is not None for g in gradients.values()), [n for n, g in gradients.items() if g is None]
    return [o.detach() for o in outputs], gradients
