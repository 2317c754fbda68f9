"""Megatron-Core's GPT with the plain model's weights, on one GPU: its layers of Transformer Engine where that is there,
else its own of plain PyTorch ("local").
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn import functional as F

import megakern as mk


def model_of(config: mk.GPTConfig, plain: dict[str, torch.Tensor], device: torch.device) -> torch.nn.Module:
    """A GPT-2. Its groups of processes are made for this one process alone."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(1, 1)
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(0)  # its dropouts want this generator, at 0 too
    settings = TransformerConfig(
        num_layers=config.layers, hidden_size=config.width, num_attention_heads=config.heads,
        use_cpu_initialization=True, attention_dropout=0.0, hidden_dropout=0.0, activation_func=F.gelu,
        layernorm_epsilon=config.norm_eps, bias_activation_fusion=False, attention_softmax_in_fp32=True,
    )  # fmt: skip
    engine = importlib.util.find_spec("transformer_engine") is not None
    kind = "get_gpt_layer_with_transformer_engine_spec" if engine else "get_gpt_layer_local_spec"
    model = GPTModel(
        config=settings, transformer_layer_spec=getattr(gpt_layer_specs, kind)(), vocab_size=config.vocab_size,
        max_sequence_length=config.sequence_length, share_embeddings_and_output_weights=True,
    )  # fmt: skip
    ours = dict(model.named_parameters())
    values = weights(plain, config, engine)
    assert ours.keys() == values.keys(), sorted(ours.keys() ^ values.keys())
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(values[name])
    return model.to(device)


def weights(plain: dict[str, torch.Tensor], config: mk.GPTConfig, engine: bool) -> dict[str, torch.Tensor]:
    """By Megatron-Core's names; rows of q, k, v stand together for each head. Transformer Engine's norms are a part of
    the linear layer after them."""
    H = config.heads
    found = {
        "embedding.word_embeddings.weight": plain["tokens.weight"],
        "embedding.position_embeddings.weight": plain["positions.weight"],
    }
    parts = {"attention.qkv": "self_attention.linear_qkv.", "attention.proj": "self_attention.linear_proj.",
             "fc1": "mlp.linear_fc1.", "fc2": "mlp.linear_fc2."}  # fmt: skip
    parts |= (
        {"norm1": "self_attention.linear_qkv.layer_norm_", "norm2": "mlp.linear_fc1.layer_norm_"}
        if engine
        else {"norm1": "input_layernorm.", "norm2": "pre_mlp_layernorm."}
    )
    for kind in ("weight", "bias"):
        found[f"decoder.final_layernorm.{kind}"] = plain[f"norm.{kind}"]
        for layer in range(config.layers):
            for theirs, name in parts.items():
                value = plain[f"blocks.{layer}.{theirs}.{kind}"]
                if theirs == "attention.qkv":
                    value = value.view(3, H, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
                found[f"decoder.layers.{layer}.{name}{kind}"] = value
    return found


def loss_of(model: torch.nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """tokens, targets (B, T) -> the mean loss."""

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device).expand(B, T)
        hidden = torch.ones(1, 1, T, T, dtype=torch.bool, device=tokens.device).triu(1)
        return model(tokens, positions, hidden, labels=targets).float().mean()

    return loss
