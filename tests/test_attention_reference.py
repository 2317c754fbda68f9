"""The dense reference of attention against torch, against a loop over rows, and its gradients. No device needed."""

from __future__ import annotations

import math

import pytest
import torch

from megakern.ops.attention_reference import attention_reference
from tests.test_attention import SEED, make


@pytest.mark.parametrize("causal", [True, False])
def test_reference_matches_torch(causal):
    v = make(2, 7, 7, 4, 2, 8, torch.float64)
    q, k, value = (x.transpose(1, 2) for x in v.values())
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, value, is_causal=causal, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(attention_reference(**v, causal=causal, scale=0.3), theirs.transpose(1, 2))


def test_alibi_is_a_bias_of_the_scores():
    """Last query beside last key, as in flash-attn; a bias made here, T = 3 and S = 5."""
    v = make(1, 3, 5, 2, 2, 4, torch.float64)
    q, k, value = (x.transpose(1, 2) for x in v.values())
    distance = torch.tensor([[2, 1, 0, 1, 2], [3, 2, 1, 0, 1], [4, 3, 2, 1, 0]])
    slopes = torch.tensor([0.5, 0.25])
    bias = -slopes.double()[:, None, None] * distance
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, value, attn_mask=bias[None])
    torch.testing.assert_close(attention_reference(**v, causal=False, alibi_slopes=slopes), theirs.transpose(1, 2))


@pytest.mark.parametrize("T, S", [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize("causal, window", [(True, None), (False, (2, 1)), (True, (1, 3)), (False, (None, 0))])
def test_reference_matches_a_loop(T, S, causal, window):
    """One row at a time in Python numbers, softcap and lse included."""
    v = make(1, T, S, 1, 1, 3, torch.float64)
    out, lse = attention_reference(**v, causal=causal, window=window, softcap=1.2, return_lse=True)
    q, k, value = (x[0, :, 0].tolist() for x in v.values())
    for t in range(T):
        own = t + S - T
        left, right = window or (None, None)
        keys = [
            j
            for j in range(S)
            if not (causal and j > own)
            and not (left is not None and j < own - left)
            and not (right is not None and j > own + right)
        ]
        dots = [sum(a * b for a, b in zip(q[t], k[j], strict=True)) / math.sqrt(3) for j in keys]
        weights = [math.exp(1.2 * math.tanh(dot / 1.2)) for dot in dots]
        total = sum(weights)
        row = [sum(w * value[j][d] for w, j in zip(weights, keys, strict=True)) / (total or 1) for d in range(3)]
        torch.testing.assert_close(out[0, t, 0], torch.tensor(row, dtype=torch.float64))
        assert lse[0, 0, t].item() == pytest.approx(math.log(total) if keys else -math.inf)


@pytest.mark.parametrize("options", [{}, {"window": (1, 1), "causal": False}, {"softcap": 1.0}, {"dropout_p": 0.3}])
def test_reference_passes_gradcheck(options):
    inputs = tuple(x.requires_grad_() for x in make(1, 5, 3, 2, 1, 3, torch.float64).values())
    torch.autograd.gradcheck(lambda q, k, v: attention_reference(q, k, v, seed=SEED, **options), inputs)
