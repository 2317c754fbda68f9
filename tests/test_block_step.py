"""A block over a few new tokens as one kernel: against float64, the separate ops, itself alone; what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import megakern as mk
from megakern.kernels.torch import native
from megakern.layers.lora import add_adapters
from megakern.model.generate import complete
from megakern.model.gpt import rope_tables
from megakern.ops.block_step import BlockWeights, Pages, block_step, block_step_reference
from tests.closeness import assert_close_to_ref
from tests.test_cpu_kernels import draw, needs_kernels, same_bits_with_three_threads

pytestmark = needs_kernels

# (heads, kv_heads, head_dim, C, F, what else): odd sizes, a head of more than one vector, one of less, grouped heads.
SHAPES = {
    "gpt2": (4, 4, 16, 64, 256, {"activation": "gelu_tanh", "bias": True, "centre": True}),
    "llama": (6, 2, 24, 72, 90, {"gated": True, "rope": True}),
    "qwen3": (2, 1, 70, 37, 33, {"gated": True, "rope": True, "qk_norm": True, "window": 3}),
    "gptj": (3, 3, 8, 45, 51, {"activation": "gelu", "bias": True, "centre": True, "parallel": True, "rope": True}),
    "falcon": (8, 1, 128, 40, 70, {"activation": "relu_squared", "window": 0}),
}
DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16),
          "bf16 of fp32": (torch.bfloat16, torch.float32)}  # fmt: skip


def weights_of(name: str, dtype: torch.dtype) -> BlockWeights:
    heads, kv_heads, head_dim, C, F, how = SHAPES[name]
    seeds = iter(range(100))

    def linear(N, K):
        bias = draw(N, dtype=dtype, seed=next(seeds), scale=0.3) if how.get("bias") else None
        return draw(N, K, dtype=dtype, seed=next(seeds), scale=1.5 / K**0.5), bias

    def norm(width):
        bias = draw(width, dtype=dtype, seed=next(seeds), scale=0.3) if how.get("centre") else None
        return (1 + draw(width, dtype=dtype, seed=next(seeds), scale=0.2)).to(dtype), bias

    heads_normed = [(norm(head_dim)[0], None) if how.get("qk_norm") else None for _ in range(2)]
    return BlockWeights(
        norm(C), None if how.get("parallel") else norm(C), *heads_normed,
        qkv=linear((heads + 2 * kv_heads) * head_dim, C), proj=linear(C, heads * head_dim), fc1=linear(F, C),
        up=linear(F, C) if how.get("gated") else None, fc2=linear(C, F), heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, centre=how.get("centre", False), activation=how.get("activation", "silu"),
        window=how.get("window"), eps=1e-5, head_eps=1e-6,
    )  # fmt: skip


def pages_of(weights: BlockWeights, lengths: list[int], T: int, dtype: torch.dtype, page_size: int = 4) -> Pages:
    """Past keys and values at random; rows of no token, and those of the new ones, are NaN."""
    B, P = len(lengths), 12
    order = torch.randperm(B * P + 3, generator=torch.Generator().manual_seed(3)).int()
    table = order[: B * P].view(B, P).clone()
    caches = []
    for seed in (50, 51):
        cache = torch.full((B * P + 3, page_size, weights.kv_heads, weights.head_dim), float("nan"), dtype=dtype)
        for b, length in enumerate(lengths):
            for j in range(length - T):
                row = draw(weights.kv_heads, weights.head_dim, dtype=dtype, seed=1000 * seed + 100 * b + j, scale=1.0)
                cache[table[b, j // page_size], j % page_size] = row
        caches.append(cache)
    return Pages(*caches, table, torch.tensor(lengths, dtype=torch.int32))


def tables_of(name: str):
    heads, _, head_dim, _, _, how = SHAPES[name]
    if not how.get("rope"):
        return None
    return rope_tables(mk.GPTConfig(width=heads * head_dim, heads=heads, positions="rope", sequence_length=64))


def as_dtype(weights: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    def of(pair):
        return None if pair is None else tuple(None if t is None else t.to(dtype) for t in pair)

    return BlockWeights(*map(of, weights[:9]), *weights[9:])


def rounded(weights: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """Matrices as products read them."""

    def of(pair):
        return None if pair is None else (pair[0].to(dtype).to(pair[0].dtype), pair[1])

    return weights._replace(**{name: of(getattr(weights, name)) for name in ("qkv", "proj", "fc1", "up", "fc2")})


def copied(pages: Pages, dtype: torch.dtype | None = None) -> Pages:
    return Pages(*(t.to(dtype or t.dtype, copy=True) for t in pages[:2]), *pages[2:])


# Lengths with the T new tokens: nothing before them, within a page, its end, several pages.
CASES = [([1], 1), ([5], 1), ([33], 1), ([8], 8), ([4, 21, 9], 1), ([17, 3], 3), ([2, 9, 30, 4, 1, 7, 44, 12], 1)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtypes):
    dtype, weight_dtype = DTYPES[dtypes]
    weights, rope = weights_of(name, weight_dtype), tables_of(name)
    for lengths, T in CASES:
        pages = pages_of(weights, lengths, T, dtype)
        hidden = draw(len(lengths), T, SHAPES[name][3], dtype=dtype, seed=7, scale=1.0)

        def ours(hidden=hidden, pages=pages):
            own = copied(pages)
            out = block_step(hidden, weights, own, rope)
            return out, *(cache.nan_to_num(nan=7.0) for cache in own[:2])

        found = same_bits_with_three_threads(ours)
        results = []
        for precision in (torch.float64, dtype):
            own = copied(pages, precision)
            out = block_step_reference(hidden.to(precision), as_dtype(rounded(weights, dtype), precision), own, rope)
            results.append((out, *(cache.nan_to_num(nan=7.0) for cache in own[:2])))
        for what, out, wide, same in zip(("out", "keys", "values"), found, *results, strict=True):
            assert_close_to_ref(out, wide, same, name=f"{what} of {lengths}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_depend_on_those_beside_it(dtype):
    weights, rope, lengths = weights_of("llama", dtype), tables_of("llama"), [4, 21, 9, 40, 1]
    pages, hidden = pages_of(weights, lengths, 1, dtype), draw(5, 1, 72, dtype=dtype)
    together = block_step(hidden, weights, copied(pages), rope)
    for b in range(5):
        own = Pages(*copied(pages)[:2], pages.block_table[b : b + 1], pages.lengths[b : b + 1])
        assert torch.equal(block_step(hidden[b : b + 1], weights, own, rope), together[b : b + 1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": [49]}, "lengths must be between T = 1 and 48, the keys of the table, got 49"),
        ({"lengths": [0]}, "lengths must be between T = 1 and 48, the keys of the table, got 0"),
        ({"page": 15}, "pages named in block_table must be between 0 and 14, got 15"),
        ({"page": -1}, "pages named in block_table must be between 0 and 14, got -1"),
        ({"positions": 4}, "cos and sin have 4 positions, too few for a length of 5"),
    ],
)
def test_places_that_are_not_there_are_refused(change, message):
    weights, (cos, sin) = weights_of("llama", torch.float32), tables_of("llama")
    pages = pages_of(weights, [5], 1, torch.float32)
    if "lengths" in change:
        pages = pages._replace(lengths=torch.tensor(change["lengths"], dtype=torch.int32))
    pages.block_table[0, 1] = change.get("page", pages.block_table[0, 1])
    rope = cos[: change.get("positions", 64)].contiguous(), sin[: change.get("positions", 64)].contiguous()
    with pytest.raises(ValueError, match=message):
        block_step(draw(1, 1, 72), weights, pages, rope)


def test_what_does_not_fit_is_left_to_the_separate_ops():
    weights, x = weights_of("gpt2", torch.float32), draw(1, 1, 64)
    pages = pages_of(weights, [5], 1, torch.float32)

    def takes(hidden=x, weights=weights, rope=None):
        before = pages.keys.nan_to_num(nan=7.0)
        if block_step(hidden, weights, pages, rope) is not None:
            return True
        assert torch.equal(pages.keys.nan_to_num(nan=7.0), before)
        return False

    angles = torch.zeros(64, 8)
    assert takes() and takes(rope=(angles, angles))
    assert not takes(draw(1, 9, 64)), "too many rows"
    assert not takes(draw(1, 0, 64)), "no rows"
    assert not takes(x.bfloat16()), "pages of another dtype"
    assert not takes(x.double()), "no kernel of that dtype"
    assert not takes(weights=weights._replace(head_dim=257)), "a larger head"
    assert not takes(weights=as_dtype(weights, torch.bfloat16)), "weights of another dtype"
    assert not takes(weights=weights._replace(fc1=(draw(64, 256).t(), weights.fc1[1]))), "strided weights"
    assert not takes(rope=(angles.double(), angles.double())) and not takes(rope=(angles[:, :4], angles[:, :4]))
    with native.composites_only():
        assert not takes()
    with mk.use_backend("torch"):
        assert not takes(), "somebody asked for a backend"


def test_what_is_kept_is_that_of_the_tensors_of_the_call():
    """Other weights, and the same parameters elsewhere in memory, are not taken for those before."""
    weights, x, kept = weights_of("gpt2", torch.float32), draw(1, 1, 64), {}
    pages = pages_of(weights, [5], 1, torch.float32)
    first = block_step(x, weights, pages, kept=kept)
    held = kept["block_step"]
    assert torch.equal(block_step(x, weights, pages, kept=kept), first) and kept["block_step"] is held
    other = weights._replace(proj=(weights.proj[0] * 2, weights.proj[1]))
    found = block_step(x, other, pages, kept=kept)
    assert torch.equal(found, block_step(x, other, pages)) and not torch.equal(found, first)
    other.proj[0].data = weights.proj[0] * 3
    assert torch.equal(block_step(x, other, pages, kept=kept), block_step(x, other, pages))
    assert not torch.equal(block_step(x, other, pages, kept=kept), found)


def test_generation_runs_on_it_and_without_it_writes_the_same(monkeypatch):
    """All but prompts of more rows, adapters, and a choice of backends."""
    calls, kernel = [], native.PreparedBlock.run
    monkeypatch.setattr(native.PreparedBlock, "run", lambda *a: calls.append(a) or kernel(*a))
    config = mk.GPTConfig(layers=2, width=48, heads=4, kv_heads=2, vocab_size=250, sequence_length=64, init_std=0.2,
                          norm="rmsnorm", activation="swiglu", positions="rope")  # fmt: skip
    model = mk.GPT(config, seed=4).eval()
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1]]

    def write():
        calls.clear()
        return [each.tokens for each in complete(model, prompts, max_new_tokens=8)]

    found = write()
    assert len(calls) == 7 * config.layers, "the first token of all comes from the prompts"
    with native.composites_only():
        assert write() == found and not calls
    with mk.use_backend("torch"):
        assert write() == found and not calls
    adapted = mk.GPT(dataclasses.replace(config), seed=4).eval()
    add_adapters(adapted, mk.ParallelContext(), rank=2, alpha=4.0, targets=["qkv"])
    for name, parameter in adapted.named_parameters():
        if name.endswith(("adapter.a", "adapter.b")):
            torch.nn.init.normal_(parameter, std=0.5)
    model = adapted
    assert write() != found and not calls


def test_weights_in_huge_pages_are_the_same_weights():
    large = [draw(700, 900), draw(1 << 20, dtype=torch.bfloat16), draw(3)]
    before = [(t.clone(), t.data_ptr()) for t in large]
    assert native.use_huge_pages(large) in (True, False)  # a system may have no such pages left
    for t, (values, address) in zip(large, before, strict=True):
        assert torch.equal(t, values) and t.data_ptr() == address
