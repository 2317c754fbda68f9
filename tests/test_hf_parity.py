"""The same numbers as Hugging Face transformers: logits, and losses over five AdamW steps. No device needed.

The models are small and random; weights are copied by the name maps below, which are written for these tests alone.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import megakern as mk
from megakern.config import GPTConfig, RopeScaling

transformers = pytest.importorskip(
    "transformers", reason="the comparison needs transformers: pip install megakern[dev]"
)

V, C, LAYERS, HEADS, T = 96, 48, 2, 6, 32
EAGER = {"attn_implementation": "eager"}


def grouped(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """Rows of separate q, k, v to rows of [q .. q, k, v] for each key-value group."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def from_gpt2(theirs: dict) -> dict:
    ours = {
        "embedding.weight": theirs["transformer.wte.weight"],
        "positions.weight": theirs["transformer.wpe.weight"],
        "norm.weight": theirs["transformer.ln_f.weight"],
        "norm.bias": theirs["transformer.ln_f.bias"],
    }
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attention.proj": "attn.c_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            for name, their_name in names.items():
                value = theirs[f"{h}{their_name}.{kind}"]
                ours[f"blocks.{i}.{name}.{kind}"] = value.t() if value.ndim == 2 else value  # Conv1D is (in, out)
            qkv = theirs[f"{h}attn.c_attn.{kind}"]
            ours[f"blocks.{i}.attention.qkv.{kind}"] = grouped(
                list((qkv.t() if qkv.ndim == 2 else qkv).chunk(3)), HEADS
            )
    return ours


def from_llama(theirs: dict, groups: int) -> dict:
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    ours["head.weight"] = theirs["lm_head.weight"]
    names = {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attention.proj": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
        "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    }  # fmt: skip
    for i in range(LAYERS):
        h = f"model.layers.{i}."
        for name, their_name in names.items():
            if f"{h}{their_name}.weight" in theirs:
                ours[f"blocks.{i}.{name}.weight"] = theirs[f"{h}{their_name}.weight"]
        for kind in ("weight", "bias"):
            if f"{h}self_attn.q_proj.{kind}" in theirs:
                parts = [theirs[f"{h}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                ours[f"blocks.{i}.attention.qkv.{kind}"] = grouped(parts, groups)
    return ours


def gpt2_pair():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.1, **EAGER,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    ours = GPTConfig(layers=LAYERS, width=C, heads=HEADS, vocab_size=V, vocab_multiple=64, sequence_length=T)
    return theirs, fill(ours, theirs, from_gpt2)


LLAMA = {
    "vocab_size": V, "hidden_size": C, "intermediate_size": 80, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": T, "rms_norm_eps": 1e-5,
    "initializer_range": 0.1, "tie_word_embeddings": False, **EAGER,
}  # fmt: skip
OURS = {
    "layers": LAYERS, "width": C, "heads": HEADS, "kv_heads": 2, "ffn_size": 80, "vocab_size": V, "vocab_multiple": 64,
    "sequence_length": T, "norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "bias": False,
    "tied_embeddings": False,
}  # fmt: skip


def llama_pair():
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rope_theta=1000.0))
    return theirs, fill(GPTConfig(**OURS, rope_base=1000.0), theirs, lambda state: from_llama(state, 2))


def llama3_rope_pair():
    torch.manual_seed(0)
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
    parameters = {
        "rope_type": "llama3", "rope_theta": 50.0, "original_max_position_embeddings": 16, **scaling
    }  # fmt: skip
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rope_parameters=parameters))
    ours = GPTConfig(**OURS, rope_base=50.0, rope_scaling=RopeScaling(kind="llama3", original_length=16, **scaling))
    return theirs, fill(ours, theirs, lambda state: from_llama(state, 2))


def qwen2_pair():
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA, use_sliding_window=False))
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # they start at zero, which would show nothing
    return theirs, fill(GPTConfig(**OURS, qkv_bias=True), theirs, lambda state: from_llama(state, 2))


def qwen3_pair():
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=10))
    for name, parameter in theirs.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0)
    return theirs, fill(GPTConfig(**OURS, head_dim=10, qk_norm=True), theirs, lambda state: from_llama(state, 2))


def mistral_pair():
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=5))
    # Theirs counts the token itself, ours what is before it.
    return theirs, fill(GPTConfig(**OURS, window=4), theirs, lambda state: from_llama(state, 2))


def fill(config: GPTConfig, theirs: torch.nn.Module, name_map) -> mk.GPT:
    model = mk.GPT(config)
    values = name_map(theirs.state_dict())
    ours = model.state_dict()
    assert values.keys() == ours.keys()
    with torch.no_grad():
        for name, value in values.items():
            rows = V if name in ("embedding.weight", "head.weight") else len(value)  # after V comes padding
            assert ours[name][:rows].shape == value.shape, name
            ours[name][:rows].copy_(value)
    return model


PAIRS = [gpt2_pair, llama_pair, llama3_rope_pair, qwen2_pair, qwen3_pair, mistral_pair]


@pytest.mark.parametrize("pair", PAIRS)
def test_logits(pair):
    theirs, ours = pair()
    tokens = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = theirs.eval()(tokens).logits, ours.eval()(tokens)
    assert expected.std() > 0.3, "logits near zero would show nothing"
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", [gpt2_pair, llama_pair])
def test_five_adamw_steps(pair):
    theirs, ours = pair()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    their_optimizer = torch.optim.AdamW(theirs.parameters(), **settings)
    our_optimizer = mk.AdamW(ours.parameters(), **settings)
    g = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(5):
        text = torch.randint(0, V, (3, T + 1), generator=g)
        tokens, targets = text[:, :-1], text[:, 1:]
        pair_losses = (F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()), ours(tokens, targets))
        for loss, optimizer in zip(pair_losses, (their_optimizer, our_optimizer), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair_losses])
    for step, (expected, loss) in enumerate(losses):
        assert loss == pytest.approx(expected, abs=1e-4), f"step {step}: {losses}"
    assert abs(losses[0][0] - losses[-1][0]) > 0.05, "the steps must change the model"
