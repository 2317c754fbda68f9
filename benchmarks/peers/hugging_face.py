"""transformers' GPT-2 and Llama with the weights of the other contestants."""

from __future__ import annotations

import torch

import megakern as mk


def model_of(config: mk.GPTConfig, device: torch.device, plain: dict[str, torch.Tensor] | None = None, **more):
    """A GPT-2 with the plain model's weights, or a Llama from a fixed seed. Attention by PyTorch's fused function."""
    if config.positions == "rope":
        return _llama(config, device, **more)
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.sequence_length, n_embd=config.width,
            n_layer=config.layers, n_head=config.heads, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa", **more,
        )
    )  # fmt: skip
    missing, unexpected = model.load_state_dict(gpt2_weights(plain, config.layers), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.to(device)


def gpt2_weights(plain: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """By transformers' names; its Conv1D holds (in, out)."""
    found = {"transformer.wte.weight": plain["tokens.weight"], "transformer.wpe.weight": plain["positions.weight"]}
    parts = {"norm1": "ln_1", "norm2": "ln_2", "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj",
             "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}  # fmt: skip
    for kind in ("weight", "bias"):
        found[f"transformer.ln_f.{kind}"] = plain[f"norm.{kind}"]
        for layer in range(layers):
            for ours, theirs in parts.items():
                value = plain[f"blocks.{layer}.{ours}.{kind}"]
                found[f"transformer.h.{layer}.{theirs}.{kind}"] = value.t() if value.ndim == 2 else value
    return found


def _llama(config: mk.GPTConfig, device: torch.device, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.size_of_ffn,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, rms_norm_eps=config.norm_eps,
        num_key_value_heads=config.key_value_heads, max_position_embeddings=config.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tied_embeddings, use_cache=False, attn_implementation="sdpa", **more,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):  # the same seed on the same device: the same weights in every process
        return LlamaForCausalLM(settings)


def llama_weights(config: mk.GPTConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """That Llama's weights by our names; q, k and v rows stand together for each key-value head."""
    theirs = _llama(config, device).state_dict()
    groups = config.key_value_heads
    found = {"embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    if not config.tied_embeddings:
        found["head.weight"] = theirs["lm_head.weight"]
    parts = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attention.proj": "self_attn.o_proj",
             "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}  # fmt: skip
    for layer in range(config.layers):
        for ours, name in parts.items():
            found[f"blocks.{layer}.{ours}.weight"] = theirs[f"model.layers.{layer}.{name}.weight"]
        rows = [theirs[f"model.layers.{layer}.self_attn.{x}_proj.weight"].unflatten(0, (groups, -1)) for x in "qkv"]
        found[f"blocks.{layer}.attention.qkv.weight"] = torch.cat(rows, dim=1).flatten(0, 1)
    return found
