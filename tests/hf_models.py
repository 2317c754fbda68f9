"""Small random models of transformers in every family and shape that `megakern convert` knows, made offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megakern.data.tokenizer import train_bpe

transformers = pytest.importorskip("transformers", reason="conversions are compared with it: pip install megakern[dev]")

T = 64  # longest sequence
_SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
          "max_position_embeddings": T, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
_GPT2 = {"n_positions": T, "n_embd": 48, "n_head": 6, "bos_token_id": None, "eos_token_id": 0}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
           "original_max_position_embeddings": 16}  # fmt: skip


def _rope(theta: float, **scaling) -> dict:
    return {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta}}


# name -> (family, the keys of its config)
MODELS: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2", {**_GPT2, "n_layer": 2, "vocab_size": 301}),
    "gpt2-untied": ("GPT2", {**_GPT2, "n_layer": 1, "vocab_size": 320, "tie_word_embeddings": False,
                             "activation_function": "gelu"}),
    "gpt2-wide": ("GPT2", {**_GPT2, "n_layer": 3, "vocab_size": 331, "n_inner": 100, "layer_norm_epsilon": 1e-4}),
    "llama2": ("Llama", {**_SHAPE, "vocab_size": 301, "num_key_value_heads": 6}),
    "llama3": ("Llama", {**_SHAPE, "vocab_size": 331, "num_key_value_heads": 2, "tie_word_embeddings": True,
                         **_rope(50.0, **_LLAMA3)}),
    "llama-linear": ("Llama", {**_SHAPE, "vocab_size": 320, "num_key_value_heads": 2, "head_dim": 12,
                               **_rope(500.0, rope_type="linear", factor=2.0)}),
    "qwen2": ("Qwen2", {**_SHAPE, "vocab_size": 301, "num_key_value_heads": 2, **_rope(100.0)}),
    "qwen2-tied": ("Qwen2", {**_SHAPE, "vocab_size": 331, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {**_SHAPE, "vocab_size": 320, "num_key_value_heads": 2, "use_sliding_window": True,
                               "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {**_SHAPE, "vocab_size": 301, "num_key_value_heads": 2, "head_dim": 10, **_rope(100.0)}),
    "qwen3-tied": ("Qwen3", {**_SHAPE, "vocab_size": 331, "num_key_value_heads": 2, "head_dim": 8,
                             "tie_word_embeddings": True}),
    "qwen3-llama3": ("Qwen3", {**_SHAPE, "vocab_size": 320, "num_key_value_heads": 6, "head_dim": 16,
                               **_rope(50.0, **_LLAMA3)}),
    "mistral": ("Mistral", {**_SHAPE, "vocab_size": 301, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
    "mistral-full": ("Mistral", {**_SHAPE, "vocab_size": 320, "num_key_value_heads": 2, "head_dim": None,
                                 "sliding_window": None, "tie_word_embeddings": True}),
    "mistral-wide": ("Mistral", {**_SHAPE, "vocab_size": 331, "num_key_value_heads": 6, "head_dim": 12,
                                 "sliding_window": 40, **_rope(100.0, rope_type="linear", factor=4.0)}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32):
    """The model called `name`, each parameter drawn at random: with biases 0 and norms 1 much would be hidden."""
    family, keys = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**keys, attn_implementation="eager")
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and path.endswith("weight")
            # What a layer adds must count beside the embedding, or a tied model repeats the last token for ever.
            wide = any(part in path for part in (".wpe.", ".o_proj.", ".down_proj."))
            parameter.normal_(mean=float(norm), std=0.3 if wide else 0.1)
    return model.to(dtype).eval()


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **how):
    """A folder as the Hub has it, with a small tokenizer. Returns the model."""
    model = make(name, dtype)
    model.save_pretrained(folder, **how)
    tokenizer().save(folder / "tokenizer.json")
    return model


_made: list = []


def tokenizer():
    if not _made:
        _made.append(train_bpe(["the cat sat on the mat, and the dog saw it; 12 + 30 = 42.\n" * 9], 280))
    return _made[0]


def edit(folder: Path, file: str = "config.json", *, remove: tuple[str, ...] = (), **changes) -> None:
    """Changes keys of a JSON file in `folder`."""
    path = folder / file
    table = json.loads(path.read_text()) if path.exists() else {}
    table = {key: value for key, value in (table | changes).items() if key not in remove}
    path.write_text(json.dumps(table))
