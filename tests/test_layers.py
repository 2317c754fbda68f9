"""Layers against unsharded PyTorch modules in float64, on one, two and four gloo ranks; initial values; collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F

import megakern as mk
from megakern.config import ConfigError, GPTConfig
from megakern.layers.dropout import DropoutKey
from megakern.layers.parameter import Normal, add_parameter, initialize
from tests.ranks import through_gloo

K, N, C, HEADS, GROUPS, D = 24, 40, 32, 8, 4, 4
VOCAB, MULTIPLE = 50, 16  # padded to 64: with four ranks the last owns 2 real rows and 14 of padding


def make(kind: str, parallel: mk.ParallelContext | None, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(5)
    how = {"parallel": parallel, "dtype": dtype, "init_std": 0.3}
    if kind == "column":
        return mk.ColumnParallelLinear(K, N, gather_output=True, activation="gelu", **how)
    if kind == "row":
        return mk.RowParallelLinear(K, N, input_is_parallel=False, **how)
    if kind == "embedding":
        return mk.VocabParallelEmbedding(VOCAB, C, vocab_multiple=MULTIPLE, **how)
    if kind == "mlp":
        return mk.ParallelMLP(C, 48, activation="relu_squared", **how)
    if kind == "gated mlp":
        return mk.ParallelMLP(C, 48, activation="swiglu", bias=False, **how)
    if kind == "attention":
        return mk.ParallelAttention(C, HEADS, kv_heads=GROUPS, head_dim=D, qk_norm=True, window=3, **how)
    raise AssertionError(kind)


def inputs_of(kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(9)
    if kind == "embedding":
        return torch.randint(0, VOCAB, (3, 7), generator=g)
    return torch.randn(3, 7, K if kind in ("column", "row") else C, generator=g, dtype=torch.float64)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def randomize_constants(layer: nn.Module) -> None:
    """Biases and norm weights that differ from 0 and 1, so that a test sees where they enter."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 1:
            values = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64
            )
            with torch.no_grad():
                if isinstance(parameter, DTensor) and parameter.placements[0].is_shard():
                    group = parameter.device_mesh.get_group()
                    values = values.chunk(group.size())[group.rank()]
                (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(values)


def run_layer(kind: str, tp: int) -> tuple[dict, dict]:
    """-> (full weights, {"output", "dx", gradient of each weight in full})."""
    layer = make(kind, mk.ParallelContext.create(tp=tp) if tp > 1 else None)
    randomize_constants(layer)
    x = inputs_of(kind)
    x = x.requires_grad_() if x.is_floating_point() else x
    output = layer(x)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * weight).sum().backward()
    mk.finish_gradients(layer.parameters())
    results = {"output": output.detach(), "dx": x.grad}
    for name, parameter in layer.named_parameters():
        results[name] = full(parameter.grad)
    return {name: full(parameter) for name, parameter in layer.named_parameters()}, results


def plain(kind: str, weights: dict, x: torch.Tensor) -> torch.Tensor:
    """The same layer written with torch.nn.functional and full weights."""
    if kind == "column":
        return F.gelu(F.linear(x, weights["weight"], weights["bias"]))
    if kind == "row":
        return F.linear(x, weights["weight"], weights["bias"])
    if kind == "embedding":
        return F.embedding(x, weights["weight"])
    if kind == "mlp":
        inner = F.relu(F.linear(x, weights["fc1.weight"], weights["fc1.bias"])) ** 2
        return F.linear(inner, weights["fc2.weight"], weights["fc2.bias"])
    if kind == "gated mlp":
        return F.linear(
            F.silu(F.linear(x, weights["gate.weight"])) * F.linear(x, weights["up.weight"]), weights["fc2.weight"]
        )
    n = HEADS // GROUPS
    rows = F.linear(x, weights["qkv.weight"], weights["qkv.bias"]).view(*x.shape[:2], GROUPS, n + 2, D)
    q, k, v = rows[..., :n, :].flatten(2, 3), rows[..., n, :], rows[..., n + 1, :]
    q, k = F.rms_norm(q, (D,), weights["q_norm.weight"], 1e-6), F.rms_norm(k, (D,), weights["k_norm.weight"], 1e-6)
    k, v = k.repeat_interleave(n, dim=2), v.repeat_interleave(n, dim=2)
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    mask = (distance >= 0) & (distance <= 3)
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return F.linear(o.transpose(1, 2).flatten(2), weights["proj.weight"], weights["proj.bias"])


KINDS = ["column", "row", "embedding", "mlp", "gated mlp", "attention"]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_matches_plain_pytorch(ranks, kind, tp):
    results = ranks.run(run_layer, tp, kind, tp) if tp > 1 else [run_layer(kind, 1)]
    weights = {name: value.requires_grad_() for name, value in run_layer(kind, 1)[0].items()}
    x = inputs_of(kind)
    x = x.requires_grad_() if x.is_floating_point() else x
    output = plain(kind, weights, x)
    (
        output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).sum().backward()
    expected = {"output": output.detach(), "dx": x.grad, **{name: value.grad for name, value in weights.items()}}
    for rank, (rank_weights, rank_results) in enumerate(results):
        for name, value in weights.items():
            assert torch.equal(rank_weights[name], value), f"rank {rank}: initial {name} depends on the layout"
        assert rank_results.keys() == expected.keys()
        for name, value in expected.items():
            if value is not None:
                torch.testing.assert_close(
                    rank_results[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_with_fp32_weights(dtype):
    layer = make("mlp", None, dtype=torch.float32)
    x = inputs_of("mlp").to(dtype).requires_grad_()
    output = layer(x, residual=x)
    output.sum().backward()
    weights = {name: value.detach().to(dtype) for name, value in layer.named_parameters()}
    expected = plain("mlp", weights, x.detach()) + x.detach()
    assert output.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(output.detach(), expected, rtol=2e-2, atol=2e-2)
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_norm_layers_match_torch():
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mk.LayerNorm(16)(x), F.layer_norm(x, (16,)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mk.RMSNorm(16, eps=1e-3)(x), F.rms_norm(x, (16,), eps=1e-3), rtol=1e-5, atol=1e-5)
    assert mk.LayerNorm(16, bias=False).bias is None
    y, h = mk.LayerNorm(16)(x, residual=x)
    torch.testing.assert_close((y, h), (F.layer_norm(2 * x, (16,)), 2 * x), rtol=1e-5, atol=1e-5)


# --- initial values ---


def test_initial_values_have_the_right_spread_and_padding_is_zero():
    torch.manual_seed(0)
    layer = mk.VocabParallelEmbedding(1000, 64, init_std=0.5)
    assert layer.weight.shape == (1024, 64) and not layer.weight[1000:].any()
    real = layer.weight[:1000]
    assert abs(real.std().item() - 0.5) < 0.01 and abs(real.mean().item()) < 0.01 and (real != 0).all()
    other = mk.VocabParallelEmbedding(1000, 64, init_std=0.5)
    assert not torch.equal(layer.weight, other.weight)
    torch.manual_seed(0)
    assert torch.equal(layer.weight, mk.VocabParallelEmbedding(1000, 64, init_std=0.5).weight)


def test_output_projections_start_smaller():
    block = mk.TransformerBlock(GPTConfig(layers=8, width=128, heads=4, init_std=0.1))
    for name, expected in [("qkv", 0.1), ("proj", 0.025)]:
        assert getattr(block.attention, name).weight.std().item() == pytest.approx(expected, rel=0.03)
    for name, expected in [("fc1", 0.1), ("fc2", 0.025)]:
        assert getattr(block.mlp, name).weight.std().item() == pytest.approx(expected, rel=0.03)


def test_values_depend_on_name_and_seed_alone():
    def holder() -> nn.Module:
        module = nn.Module()
        for name in ("a", "b"):
            module.add_module(name, nn.Module())
            add_parameter(module.get_submodule(name), "weight", (4, 6), Normal(1.0), mk.ParallelContext())
        return module

    first, second, third = holder(), holder(), holder()
    initialize(first, 1), initialize(second, 1), initialize(third, 2)
    assert torch.equal(first.a.weight, second.a.weight)
    assert not torch.equal(first.a.weight, first.b.weight) and not torch.equal(first.a.weight, third.a.weight)


# --- collectives ---


def count_all_reduces(values: dict) -> tuple[list, list]:
    """Sizes of every all-reduce of a block, forward and backward."""
    config = GPTConfig(width=C, heads=HEADS, layers=1, **values)
    context = mk.ParallelContext.create(tp=2)
    through_gloo(context.tp_group)
    block = mk.TransformerBlock(config, 0, context)
    sizes, original = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *rest, **more: (sizes.append(tensor.numel()), original(tensor, *rest, **more))[1]
    try:
        x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with CommDebugMode() as all_traffic:
            y = block(x, dropout_key=DropoutKey(0, 0) if config.dropout else None)
        forward = list(sizes)
        with CommDebugMode() as more_traffic:
            y.sum().backward()
    finally:
        dist.all_reduce = original
    assert all_traffic.get_total_counts() == len(forward), all_traffic.get_comm_counts()
    assert more_traffic.get_total_counts() == len(sizes) - len(forward), more_traffic.get_comm_counts()
    return forward, sizes[len(forward) :]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"dropout": 0.1},
        {"activation": "swiglu", "norm": "rmsnorm", "bias": False},
        {"parallel_residual": True},
        {"qk_norm": True},
    ],
    ids=",".join,
)
def test_a_block_all_reduces_twice_each_way(ranks, values):
    residual_stream = 2 * 5 * C
    for forward, backward in ranks.run(count_all_reduces, 2, values):
        assert forward == [residual_stream] * 2
        assert backward == [residual_stream] * 2


# --- errors ---


def refuse_splits() -> None:
    context = mk.ParallelContext.create(tp=4)
    with pytest.raises(ValueError, match="kv_heads = 2 cannot be split over tp = 4; choose a tp that divides it"):
        mk.ParallelAttention(C, 8, kv_heads=2, parallel=context)
    with pytest.raises(ValueError, match="ffn_size = 30 cannot be split over tp = 4"):
        mk.ParallelMLP(C, 30, parallel=context)
    with pytest.raises(ValueError, match=r"dim 0 of ColumnParallelLinear\.weight = 30 cannot be split over tp = 4"):
        mk.ColumnParallelLinear(C, 30, parallel=context)
    with pytest.raises(ValueError, match="padded vocab_size = 6 cannot be split over tp = 4"):
        mk.VocabParallelEmbedding(5, C, vocab_multiple=2, parallel=context)
    with pytest.raises(ConfigError, match=r"model\.kv_heads = 6 is not divisible by parallel\.tp = 4"):
        mk.TransformerBlock(GPTConfig(width=96, heads=6), 0, context)


def test_sizes_that_do_not_split_are_refused(ranks):
    ranks.run(refuse_splits, 4)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="heads = 8 is not divisible by kv_heads = 3"):
        mk.ParallelAttention(C, 8, kv_heads=3)
    with pytest.raises(ValueError, match="width = 32 is not divisible by heads = 5; pass head_dim"):
        mk.ParallelAttention(C, 5)
    for make_layer in (mk.ColumnParallelLinear, mk.ParallelMLP):
        with pytest.raises(ValueError, match=r"activation must be .*one of gelu, gelu_tanh, .*, got 'relu'"):
            make_layer(C, C, activation="relu")
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 50\), got 51"):
        make("embedding", None)(torch.tensor([0, 51]))
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 50\), got -1"):
        make("embedding", None)(torch.tensor([0, -1]))
    attention = mk.ParallelAttention(C, 8, dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout = 0.1 in training mode needs a dropout_key, got None; pass"):
        attention(torch.zeros(1, 2, C))
    attention.eval()(torch.zeros(1, 2, C))


def test_a_printed_layer_says_its_sizes():
    block = mk.TransformerBlock(GPTConfig(width=96, heads=6, kv_heads=3, window=7, bias=False))
    text = repr(torch.nn.ModuleList([block, mk.VocabParallelEmbedding(50, C), mk.RMSNorm(C), mk.ParallelMLP(C, 64)]))
    for shown in (
        "(norm1): LayerNorm(96, eps=1e-05, bias=False)",
        "heads=6, kv_heads=3 of this rank, head_dim=16, window=7",
        "(qkv): ColumnParallelLinear(in_features=96, out_features=192, bias=False)",
        "(fc1): ColumnParallelLinear(in_features=96, out_features=384, bias=False, activation=gelu_tanh)",
        "(1): VocabParallelEmbedding(50, 32, rows=128)",
        "(2): RMSNorm(32, eps=1e-06)",
        "(fc2): RowParallelLinear(in_features=64, out_features=32, bias=True)",
    ):
        assert shown in text, text


def repr_of_two() -> str:
    return repr(mk.ParallelMLP(C, 64, parallel=mk.ParallelContext.create(tp=2)))


def test_a_printed_layer_of_two_ranks_says_the_whole_sizes(ranks):
    for text in ranks.run(repr_of_two, 2):
        assert "(fc2): RowParallelLinear(in_features=64, out_features=32, bias=True, tp=2)" in text
