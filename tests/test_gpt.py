"""The GPT: loss and logits against a plain PyTorch GPT, recompute, dropout, precision, errors. No device needed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.peers.plain_gpt import PlainGPT
from megakern.config import ConfigError, GPTConfig, RopeScaling
from megakern.layers.dropout import DropoutKey
from megakern.model.gpt import rope_tables
from megakern.ops.dropout import keep_reference

GPT2, LLAMA = mk.presets["tiny-gpt2"], mk.presets["tiny-llama"]


def batch(config: GPTConfig, B: int = 2, T: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


def gradients(model: mk.GPT, *inputs, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*inputs, **options).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_loss_and_gradients_match_the_plain_gpt():
    config = GPTConfig(
        layers=2, width=48, heads=4, vocab_size=96, vocab_multiple=64, sequence_length=16, activation="gelu"
    )
    model = mk.GPT(config, seed=3)
    peer = PlainGPT(layers=2, width=48, heads=4, vocab_size=96, sequence_length=16)
    peer.take(model)
    tokens, targets = batch(config)
    ours, theirs = model(tokens, targets), peer(tokens, targets)
    assert ours.dtype == torch.float32 and ours.shape == ()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours.backward(), theirs.backward()
    # The embedding gathers gradients of the lookup and of the tied head, so it sees every part of the model.
    torch.testing.assert_close(model.embedding.weight.grad[:96], peer.tokens.weight.grad, rtol=1e-4, atol=1e-7)
    assert not model.embedding.weight.grad[96:].any()
    torch.testing.assert_close(
        model.blocks[0].mlp.fc1.weight.grad, peer.blocks[0].fc1.weight.grad, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_logits_agree_with_the_loss(config):
    model = mk.GPT(config, seed=1)
    tokens, targets = batch(config)
    targets[0, 3] = -100
    logits = model(tokens)
    assert logits.shape == (2, 9, config.vocab_size)
    for reduction in ("mean", "sum"):
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        torch.testing.assert_close(model(tokens, targets, reduction=reduction), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(model(tokens, last_only=True), logits[:, -1:], rtol=1e-5, atol=1e-6)
    assert abs(logits.std().item()) < 2 and abs(model(tokens, targets).item() - math.log(250)) < 0.2


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("parallel_residual", [False, True])
@pytest.mark.parametrize("modules", [None, ("attention",), ("mlp",), ("norm",), ("attention", "mlp", "norm")])
def test_recompute_gives_the_same_bits_with_dropout_on(config, parallel_residual, modules):
    config = dataclasses.replace(config, dropout=0.2, parallel_residual=parallel_residual, qk_norm=config is LLAMA)
    tokens, targets = batch(config)
    key = DropoutKey(seed=1, step=2, first_sample=4)
    kept = gradients(mk.GPT(config, seed=1), tokens, targets, dropout_key=key)
    how = {"recompute": "full"} if modules is None else {"recompute": "selective", "recompute_modules": modules}
    again = gradients(mk.GPT(config, seed=1, **how), tokens, targets, dropout_key=key)
    other = gradients(mk.GPT(config, seed=1), tokens, targets, dropout_key=dataclasses.replace(key, step=3))
    assert kept.keys() == again.keys()
    for name in kept:
        assert torch.equal(kept[name], again[name]), name
    assert not torch.equal(kept["embedding.weight"], other["embedding.weight"])


def test_dropout_does_not_depend_on_how_the_batch_is_cut():
    config = dataclasses.replace(GPT2, dropout=0.3)
    model = mk.GPT(config, seed=1)
    tokens, targets = batch(config, B=4)
    whole = gradients(model, tokens, targets, dropout_key=DropoutKey(1, 1))
    parts = [
        gradients(model, tokens[i : i + 2], targets[i : i + 2], dropout_key=DropoutKey(1, 1, first_sample=i))
        for i in (0, 2)
    ]
    for name in whole:
        torch.testing.assert_close(whole[name], (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6, msg=name)


def test_each_site_drops_by_its_own_key():
    p, (B, T, C) = 0.3, (2, 9, 64)
    model = mk.GPT(dataclasses.replace(GPT2, dropout=p), seed=1)
    tokens, _ = batch(GPT2)
    key = DropoutKey(seed=1, step=1, first_sample=5)

    def kept(site: str) -> torch.Tensor:
        seed, first = key.seed_of(site), key.first_sample * T
        rows = [[keep_reference(p, seed, (first + row,), column) for column in range(C)] for row in range(B * T)]
        return torch.tensor(rows).view(B, T, C) / (1 - p)

    # What enters and leaves the blocks, whose two branches are made constant: 1 from attention, 10 from the MLP.
    streams = []
    model.blocks[0].register_forward_pre_hook(lambda _module, inputs: streams.append(inputs[0]))
    with torch.no_grad():
        for block in model.blocks:
            block.register_forward_hook(lambda _module, _inputs, output: streams.append(output))
            for linear, value in [(block.attention.proj, 1.0), (block.mlp.fc2, 10.0)]:
                linear.weight.zero_(), linear.bias.fill_(value)
        model(tokens, dropout_key=key)
        expected = (model.embedding(tokens) + model.positions(torch.arange(T))) * kept("embedding")
    torch.testing.assert_close(streams[0], expected)
    for layer in range(2):
        key = key.at_layer(layer)
        expected = streams[layer] + kept("attention_output") + 10 * kept("mlp_output")
        torch.testing.assert_close(streams[layer + 1], expected, rtol=1e-5, atol=1e-5)

    attention = mk.ParallelAttention(C, 4, dropout=p)
    hidden = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))
    dropped = attention(hidden, dropout_key=key)
    assert torch.equal(dropped, attention(hidden, dropout_key=key))
    assert not torch.equal(dropped, attention(hidden, dropout_key=key.at_layer(0)))
    moved = attention(hidden[1:], dropout_key=dataclasses.replace(key, first_sample=6))
    torch.testing.assert_close(moved, dropped[1:], rtol=1e-5, atol=1e-6)
    model.eval()
    assert torch.equal(model(tokens), model(tokens, dropout_key=key))


def test_keys_differ_by_seed_step_layer_and_site():
    keys = [
        DropoutKey(1, 1),
        DropoutKey(2, 1),
        DropoutKey(1, 2),
        DropoutKey(1, 1).at_layer(0),
        DropoutKey(1, 1).at_layer(1),
    ]
    seeds = {key.seed_of(site) for key in keys for site in ("embedding", "attention", "attention_output", "mlp_output")}
    assert len(seeds) == 20 and all(0 <= seed < 1 << 63 for seed in seeds)


def test_bf16_compute_stays_near_fp32():
    tokens, targets = batch(LLAMA, B=4, T=32)
    wide = mk.GPT(LLAMA, seed=1)
    narrow = mk.GPT(LLAMA, seed=1, compute_dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in narrow.parameters())
    assert narrow(tokens).dtype == torch.bfloat16
    loss = narrow(tokens, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide(tokens, targets), rtol=3e-3, atol=0)
    exact, rounded = gradients(wide, tokens, targets), gradients(narrow, tokens, targets)
    for name in exact:
        assert rounded[name].dtype == torch.float32
        error = (rounded[name] - exact[name]).norm() / exact[name].norm()
        assert error < 0.05, f"{name}: relative error {error:.3f}"


def test_positions_may_be_given():
    for config in (GPT2, LLAMA):
        model = mk.GPT(config, seed=1)
        tokens, _ = batch(config)
        logits = model(tokens)
        torch.testing.assert_close(model(tokens, positions=torch.arange(9)), logits, rtol=1e-6, atol=1e-6)
        moved = torch.arange(9).expand(2, 9) + torch.tensor([[0], [3]])
        shifted = model(tokens, positions=moved)
        torch.testing.assert_close(shifted[0], logits[0], rtol=1e-5, atol=1e-5)
        same = torch.allclose(shifted[1], logits[1], atol=1e-5)
        assert same == (config is LLAMA), "learned positions see a shift, rope sees distances alone"


def test_rope_tables():
    config = dataclasses.replace(LLAMA, rope_base=100.0, head_dim=4, sequence_length=8)
    cos, sin = rope_tables(config)
    assert cos.shape == (8, 2) and cos.dtype == torch.float32
    for position in range(8):
        for i, frequency in enumerate((1.0, 0.1)):
            assert cos[position, i].item() == pytest.approx(math.cos(position * frequency), abs=1e-7)
            assert sin[position, i].item() == pytest.approx(math.sin(position * frequency), abs=1e-7)
    halved = rope_tables(dataclasses.replace(config, rope_scaling=RopeScaling(kind="linear", factor=2.0)))
    torch.testing.assert_close(halved[0][2::2], cos[1:4], rtol=0, atol=1e-7)


def test_meta_models_hold_nothing_until_they_are_materialized():
    model = mk.GPT(LLAMA, device="meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.materialize("cpu", seed=7)
    expected = mk.GPT(LLAMA, seed=7)
    tokens, _ = batch(LLAMA)
    assert torch.equal(model(tokens), expected(tokens))
    assert set(expected.state_dict()) == {name for name, _ in expected.named_parameters()}, "rope tables are not saved"


def test_a_variant_of_everything_runs_backward():
    config = GPTConfig(
        layers=2, width=32, heads=4, kv_heads=2, head_dim=6, ffn_size=40, vocab_size=30, vocab_multiple=8,
        norm="rmsnorm", sequence_length=12, activation="relu_squared", positions="rope", bias=False, qkv_bias=True,
        qk_norm=True, window=3, parallel_residual=True, tied_embeddings=False, rope_scaling=RopeScaling(factor=2.0),
    )  # fmt: skip
    model = mk.GPT(config)
    names = set(model.state_dict())
    assert "blocks.0.attention.qkv.bias" in names and "blocks.0.attention.proj.bias" not in names
    assert not any("norm2" in name for name in names) and "head.weight" in names
    found = gradients(model, *batch(config))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


def test_without_positions_order_is_not_seen():
    tokens, _ = batch(GPT2, T=3)
    swapped = tokens[:, [1, 0, 2]]
    for positions, seen in [("none", False), ("learned", True), ("rope", True)]:
        model = mk.GPT(dataclasses.replace(GPT2, layers=1, positions=positions), seed=1)
        difference = (model(tokens) - model(swapped))[:, -1].abs().max().item()
        assert (difference > 1e-4) == seen, f"{positions}: {difference}"


def test_compiles_in_one_graph():
    model = mk.GPT(LLAMA, seed=1)
    tokens, targets = batch(LLAMA)
    expected = gradients(model, tokens, targets)
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_wrong_use_is_named():
    tokens, targets = batch(GPT2)
    model = mk.GPT(GPT2)
    with pytest.raises(ValueError, match="65 tokens are more than the model's sequence_length of 64; cut the text"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\) int64, got \(9,\) torch.int64"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\) int64, got \(2, 9\) torch.float32"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"targets must be \(B, T\) = \(2, 9\) int64 like tokens, got \(2, 8\)"):
        model(tokens, targets[:, 1:])
    with pytest.raises(ValueError, match="last_only is for logits"):
        model(tokens, targets, last_only=True)
    with pytest.raises(ValueError, match=r"positions must be \(T,\) = \(9,\) or \(B, T\) = \(2, 9\), got \(1, 9\)"):
        model(tokens, positions=torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="recompute must be one of none, selective, full, got 'some'"):
        mk.GPT(GPT2, recompute="some")
    with pytest.raises(ValueError, match="recompute_modules must be some of attention, mlp, norm, got attn"):
        mk.GPT(GPT2, recompute="selective", recompute_modules=("attn",))
    with pytest.raises(ValueError, match=r"dropout = 0\.1 in training mode needs a dropout_key, got None"):
        mk.GPT(dataclasses.replace(GPT2, dropout=0.1))(tokens, targets)


def refuse_split() -> None:
    with pytest.raises(ConfigError, match=r"model\.kv_heads = 2 is not divisible by parallel\.tp = 4"):
        mk.GPT(LLAMA, mk.ParallelContext.create(tp=4), device="meta")


def test_a_model_that_does_not_split_is_refused(ranks):
    ranks.run(refuse_split, 4)
