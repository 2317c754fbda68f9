"""Under `torch.autocast`: each op's dtypes and errors beside PyTorch's functions, models of ours beside models of
torch.nn, and what is refused outside. No device needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import megakern as mk
from benchmarks.peers.plain_gpt import PlainGPT
from megakern.config import GPTConfig
from megakern.layers.dropout import DropoutKey
from megakern.layers.lora import add_adapters
from megakern.model.generate import complete
from megakern.model.sampling import Sampling
from megakern.ops.attention_reference import attention_reference
from megakern.ops.dropout import dropout
from megakern.parallel.context import ParallelContext
from tests.closeness import assert_close_to_ref
from tests.paging import paged

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
LLAMA = dataclasses.replace(mk.presets["tiny-llama"], qk_norm=True)


def autocast(dtype=BF16, **more):
    return torch.autocast("cpu", dtype=dtype, **more)


def rand(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F32).to(dtype)


TARGETS = torch.arange(6).view(2, 3) * 7 % 11
ANGLES = torch.outer(torch.arange(5.0), 100.0 ** (-torch.arange(4) / 4))


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def swiglu_layers(x, gate, up, bias):
    return F.silu(F.linear(x, gate, bias)) * F.linear(x, up)


# name -> (ours, PyTorch's, shapes of the fp32 arguments, the dtype of the result for fp32 arguments)
X, QKV = (2, 3, 16), (2, 5, 4, 8)
OPS = {
    "linear": (mk.linear, F.linear, (X, (12, 16), (12,)), BF16),
    "linear, activation, residual": (
        lambda x, w, b, r: mk.linear(x, w, b, activation="gelu", residual=r),
        lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r,
        (X, (12, 16), (12,), (2, 3, 12)), F32,
    ),
    "linear_swiglu": (
        lambda x, g, u, b: mk.linear_swiglu(x, g, u, b), swiglu_layers, (X, (12, 16), (12, 16), (12,)), BF16
    ),
    "attention": (mk.attention, sdpa, (QKV, QKV, QKV), BF16),
    "linear_cross_entropy": (
        lambda x, w: mk.linear_cross_entropy(x, w, TARGETS),
        lambda x, w: F.cross_entropy(F.linear(x, w).flatten(0, 1), TARGETS.flatten()),
        (X, (11, 16)), F32,
    ),
    "linear_cross_entropy, rows": (
        lambda x, w: mk.linear_cross_entropy(x, w, TARGETS, reduction="none"),
        lambda x, w: F.cross_entropy(F.linear(x, w).flatten(0, 1), TARGETS.flatten(), reduction="none").view(2, 3),
        (X, (11, 16)), F32,
    ),
    "cross_entropy": (
        lambda x: mk.cross_entropy(x, TARGETS),
        lambda x: F.cross_entropy(x.flatten(0, 1), TARGETS.flatten()), ((2, 3, 11),), F32,
    ),
    "layer_norm": (mk.layer_norm, lambda x, w, b: F.layer_norm(x, (16,), w, b), (X, (16,), (16,)), F32),
    "rms_norm": (mk.rms_norm, lambda x, w: F.rms_norm(x, (16,), w, 1e-6), (X, (16,)), F32),
    "gelu": (mk.gelu, F.gelu, (X,), F32),
    "swiglu": (mk.swiglu, lambda gate, up: F.silu(gate) * up, (X, X), F32),
}  # fmt: skip


def results(function, inputs, dtype, context):
    """-> the output and all gradients; the backward pass runs outside autocast, as PyTorch advises."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    with context:
        out = function(*leaves)
    (out * rand(*out.shape, seed=5).to(out)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", OPS)
def test_ops_on_fp32_tensors_are_as_exact_as_pytorchs(name):
    ours, theirs, shapes, dtype = OPS[name]
    inputs = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    found = results(ours, inputs, F32, autocast())
    wide = results(theirs, inputs, F64, autocast(enabled=False))
    same = results(theirs, inputs, F32, autocast())
    assert found[0].dtype == dtype == same[0].dtype
    assert all(gradient.dtype == F32 for gradient in found[1:]), "gradients of fp32 parameters"
    for i, each in enumerate(zip(found, wide, same, strict=True)):
        assert_close_to_ref(*each, name=f"{name}: result {i}", floor=8e-3)


@pytest.mark.parametrize("name", OPS)
def test_products_are_made_in_the_narrow_dtype(name):
    """Bit for bit those of narrow operands outside: nothing is left in fp32, and nothing that a backend computes in
    fp32 is narrowed, in the backward pass neither, which may run inside."""
    ours, _, shapes, _ = OPS[name]
    inputs = [rand(*shape, seed=i, dtype=BF16) for i, shape in enumerate(shapes)]
    outside = results(ours, inputs, BF16, autocast(enabled=False))
    leaves = [x.clone().requires_grad_() for x in inputs]
    with autocast():
        out = ours(*leaves)
        assert out.dtype == (F32 if "norm" in name else outside[0].dtype)
        (out * rand(*out.shape, seed=5).to(out)).sum().backward()
    assert all(leaf.grad.dtype == BF16 for leaf in leaves)
    if "norm" not in name:
        assert torch.equal(out, outside[0])
        assert all(torch.equal(leaf.grad, each) for leaf, each in zip(leaves, outside[1:], strict=True))


@pytest.mark.parametrize("name", OPS)
def test_a_backward_pass_of_fp32_stays_fp32_inside(name, with_and_without_cpu_kernels):
    """What was computed outside: a backend's matrix products are none of autocast's."""
    ours, _, shapes, _ = OPS[name]
    inputs = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = results(ours, inputs, F32, autocast(enabled=False))
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = ours(*leaves)
    with autocast():
        (out * rand(*out.shape, seed=5).to(out)).sum().backward()
    for leaf, gradient in zip(leaves, expected[1:], strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_norms_of_narrow_tensors_are_fp32():
    x, weight, residual = rand(4, 16, dtype=BF16), rand(16), rand(4, 16, seed=9, dtype=BF16)
    with autocast():
        y, h = mk.layer_norm(x, weight.bfloat16(), residual=residual)
        wide, total = mk.rms_norm(x, weight, residual=residual.float())
    assert (y.dtype, h.dtype, wide.dtype, total.dtype) == (F32, BF16, F32, F32)
    assert torch.equal(h, x + residual) and torch.equal(total, x.float() + residual.float())
    assert torch.equal(y, mk.layer_norm(h.float(), weight.bfloat16().float()))
    assert torch.equal(wide, mk.rms_norm(total, weight))


def halves():
    q, k = rand(*QKV, dtype=BF16), rand(*QKV, seed=1)
    return q, k


MIXED = {
    "linear": lambda: mk.linear(rand(3, 16, dtype=BF16), rand(8, 16), residual=rand(3, 8)),
    "attention": lambda: mk.attention(*halves(), rand(*QKV, seed=2)),
    "rope": lambda: mk.rope(*halves(), ANGLES.cos(), ANGLES.sin())[0],
    "swiglu": lambda: mk.swiglu(*halves()),
    "dropout": lambda: dropout(rand(3, 16, dtype=BF16), 0.5, 3, residual=rand(3, 16)),
    "layer_norm": lambda: mk.layer_norm(rand(3, 16, dtype=BF16), rand(16), residual=rand(3, 16)),
    "linear_cross_entropy": lambda: mk.linear_cross_entropy(rand(6, 16), rand(11, 16, dtype=BF16), TARGETS.flatten()),
}
WIDER = {"linear": F32, "attention": BF16, "rope": F32, "swiglu": F32, "dropout": F32}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes_are_taken_inside_and_refused_outside(name):
    with autocast():
        out = MIXED[name]()
    if name in WIDER:
        assert out.dtype == WIDER[name]
    with pytest.raises(TypeError, match=r"cast (it|one of them) with \.to\(\)"):
        MIXED[name]()
    with autocast(), autocast(enabled=False), pytest.raises(TypeError, match=r"with \.to\(\)"):
        MIXED[name]()


def test_what_is_not_of_autocast_stays():
    x, weight = rand(3, 16), rand(8, 16)
    plain = mk.linear(x, weight)
    with autocast():
        assert mk.linear(x.double(), weight.double()).dtype == F64
        assert mk.layer_norm(x.double(), rand(16).double()).dtype == F64
        with autocast(enabled=False):
            assert torch.equal(mk.linear(x, weight), plain)
        with pytest.raises(ValueError, match=r"residual must have shape \(\.\.\., N\) of the output = \(3, 8\), got"):
            mk.linear(x, weight, residual=rand(8))
        with pytest.raises(TypeError, match=r"x must be float16, bfloat16, float32 or float64, got torch\.int64"):
            mk.linear(x.long(), weight)
        assert mk.linear(torch.empty(3, 16, device="meta"), torch.empty(8, 16, device="meta")).dtype == F32
    with autocast(torch.float16):
        y = mk.linear(x, weight.bfloat16())
        assert y.dtype == torch.float16 and torch.equal(y, mk.linear(x.half(), weight.bfloat16().half()))


def test_explain_says_the_dtype():
    x, weight = rand(3, 16), rand(8, 16)
    with autocast():
        assert mk.explain(mk.linear, x, weight).problem.dtype == BF16
        assert mk.explain(mk.layer_norm, x.bfloat16(), rand(16)).problem.dtype == F32
        assert mk.explain(mk.gelu, x).problem.dtype == F32
    assert mk.explain(mk.linear, x, weight).problem.dtype == F32


def test_paged_attention_computes_in_the_dtype_of_the_cache():
    q, k, v = rand(2, 1, 4, 8), rand(2, 9, 2, 8, seed=1), rand(2, 9, 2, 8, seed=2)
    cache = paged(k, v, [9, 4], 4)
    expected = [
        attention_reference(q[b : b + 1].bfloat16().float(), k[b : b + 1, :n], v[b : b + 1, :n])
        for b, n in enumerate((9, 4))
    ]
    with autocast():
        out = mk.paged_attention(q.bfloat16(), *cache)
    assert out.dtype == BF16
    torch.testing.assert_close(out, torch.cat(expected).bfloat16())
    with pytest.raises(TypeError, match="k_cache must have the dtype of q"):
        mk.paged_attention(q.bfloat16(), *cache)


# --- models ---


def batch(config, B=2, T=9):
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


def exact(model, *inputs):
    """Loss and gradients in float64."""
    model.double().compute_dtype = F64
    return gradients(model, *inputs, context=autocast(enabled=False))


def gradients(model, *inputs, context=None, **how):
    model.zero_grad()
    with context or autocast():
        loss = model(*inputs, **how)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_is_as_exact_as_one_of_torch_nn():
    sizes = {"layers": 2, "width": 48, "heads": 4, "vocab_size": 96, "sequence_length": 16}
    model = mk.GPT(GPTConfig(**sizes, vocab_multiple=32, activation="gelu", init_std=0.1), seed=3)
    peer = PlainGPT(**sizes)
    peer.take(model)
    products = []
    model.blocks[0].attention.qkv.register_forward_hook(lambda module, inputs, out: products.append(out.dtype))
    inputs = batch(model.config)
    loss, found = gradients(model, *inputs)
    same_loss, same = gradients(peer, *inputs)
    wide_loss, wide = exact(peer, *inputs)
    assert products == [BF16] and loss.dtype == F32
    assert all(gradient.dtype == F32 for gradient in found.values())
    assert_close_to_ref(loss, wide_loss, same_loss, floor=1e-4)
    for ours, theirs in (
        ("embedding.weight", "tokens.weight"),
        ("blocks.0.mlp.fc1.weight", "blocks.0.fc1.weight"),
        ("blocks.1.mlp.fc2.bias", "blocks.1.fc2.bias"),
        ("blocks.0.attention.proj.weight", "blocks.0.attention.proj.weight"),
    ):
        assert_close_to_ref(found[ours], wide[theirs], same[theirs], name=ours, floor=8e-3)


@pytest.mark.parametrize("how", ["full", "attention", "mlp", "norm", "checkpoint"])
def test_what_is_computed_again_has_the_same_bits(how):
    config = dataclasses.replace(LLAMA, dropout=0.2)
    inputs, key = batch(config), {"dropout_key": DropoutKey(seed=1, step=2)}
    loss, kept = gradients(mk.GPT(config, seed=1), *inputs, **key)
    options = {"recompute": how}
    if how != "full":
        options = {} if how == "checkpoint" else {"recompute": "selective", "recompute_modules": (how,)}
    model = mk.GPT(config, seed=1, **options)
    if how == "checkpoint":  # PyTorch's own, around a block
        for block in model.blocks:
            inner = block.forward
            block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    again_loss, again = gradients(model, *inputs, **key)
    assert torch.equal(loss, again_loss) and kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_compiles_in_one_graph():
    model = mk.GPT(LLAMA, seed=1)
    inputs = batch(LLAMA)
    loss, expected = gradients(model, *inputs)
    compiled, found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), *inputs)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=0)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("_orig_mod.")], rtol=1e-2, atol=1e-5)
    outside = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)  # not the graph of before
    assert not torch.equal(outside, compiled)
    torch.testing.assert_close(outside, model(*inputs), rtol=1e-6, atol=0)


def test_adapters_learn():
    model = mk.GPT(LLAMA, seed=1)
    add_adapters(model, ParallelContext(), rank=4, alpha=8.0, targets=("qkv", "proj", "fc"))
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.b") or name.endswith("adapter.a"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    inputs = batch(LLAMA)
    _, found = gradients(model, *inputs)
    _, wide = exact(model, *inputs)
    assert found.keys() == wide.keys() and all("adapter" in name for name in found)
    for name, gradient in found.items():
        assert (gradient - wide[name]).norm() <= 0.05 * wide[name].norm(), name


def test_generation_sees_the_same_model():
    """The cache is fp32, the tokens that go into it are rounded as those of the whole text are."""
    model = mk.GPT(dataclasses.replace(LLAMA, init_std=0.2), seed=1).eval()
    prompt = [5, 17, 3]
    with torch.no_grad(), autocast():
        (text,) = complete(model, [prompt], max_new_tokens=6, sampling=Sampling(temperature=0.0))
        logits = model(torch.tensor([prompt + text.tokens]))[0].float()
    assert model.embedding.weight.dtype == F32
    for i, token in enumerate(text.tokens):
        row = logits[len(prompt) - 1 + i]
        assert row[token] >= row.max() - 0.05 * row.abs().max(), "greedy, but for rounding"


def two_ranks(sequence: bool):
    parallel = mk.ParallelContext.create(tp=2, sequence_parallel=sequence)
    model = mk.GPT(LLAMA, parallel, seed=1)
    inputs = batch(LLAMA, T=10)
    with autocast():
        loss = model(*inputs)
    loss.backward()
    mk.finish_gradients(model.parameters())
    return loss.detach(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("sequence", [False, True])
def test_two_ranks_are_as_exact_as_one(ranks, sequence):
    model, inputs = mk.GPT(LLAMA, seed=1), batch(LLAMA, T=10)
    same_loss, same = gradients(model, *inputs)
    wide_loss, wide = exact(model, *inputs)
    loss, found = ranks.run(two_ranks, 2, sequence)[0]
    assert_close_to_ref(loss, wide_loss, same_loss, floor=1e-4)
    for name, gradient in found.items():
        assert gradient.dtype == F32
        assert_close_to_ref(gradient, wide[name], same[name], name=name, floor=2e-2)
