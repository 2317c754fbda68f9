"""What all ops have in common, on the `torch` backend. No device needed."""

from __future__ import annotations

import pytest
import torch

import megakern as mk

X = torch.randn(2, 8, 4, 16, generator=torch.Generator().manual_seed(0))
ANGLES = torch.outer(torch.arange(8.0), 10000.0 ** (-torch.arange(8) / 8))
OPS = {
    "linear": lambda x: mk.linear(x, torch.ones(3, 16) / 9),
    "linear + gelu": lambda x: mk.linear(x, torch.ones(3, 16) / 9, torch.ones(3), activation="gelu"),
    "linear_swiglu": lambda x: mk.linear_swiglu(x, torch.ones(3, 16) / 9, torch.ones(3, 16) / 8),
    "gelu": mk.gelu,
    "swiglu": lambda x: mk.swiglu(x, x),
    "layer_norm": lambda x: mk.layer_norm(x, torch.ones(16)),
    "rms_norm": lambda x: mk.rms_norm(x, torch.ones(16), residual=x)[0],
    "rope": lambda x: mk.rope(x, x, ANGLES.cos(), ANGLES.sin())[0],
}


@pytest.mark.parametrize("name", OPS)
def test_results_can_be_changed_in_place_as_pytorchs(name):
    """As a module with inplace=True behind ours does: the gradient of the same change out of place. Attention is
    left out: its gradient needs its result, as that of PyTorch's, and autograd says so."""
    gradients = []
    for change in (lambda y: y * 3 + 1, lambda y: y.mul_(3).add_(1)):
        x = X.clone().requires_grad_()
        change(OPS[name](x)).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", OPS)
def test_a_second_derivative_is_refused(name):
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"there is no second derivative \(create_graph=True\); use PyTorch's own"):
        torch.autograd.grad(OPS[name](x).square().sum(), x, create_graph=True)


def test_the_gradient_of_the_loss_takes_the_place_of_our_logits():
    weight, targets = (
        torch.randn(50, 16, generator=torch.Generator().manual_seed(1)),
        torch.arange(64).view(2, 8, 4) % 50,
    )
    gradients = []
    for in_place in (False, True):
        x = X.clone().requires_grad_()
        mk.cross_entropy(mk.linear(x, weight), targets, in_place=in_place).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
