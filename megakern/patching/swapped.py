"""The `forward` of each swapped module: mixins, which `classes.py` puts before the module's own class.

`_megakern` on a module holds the options of its patch, `_unpatched` on its class the class that it had.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megakern.ops.activation import gelu, swiglu
from megakern.ops.linear_cross_entropy import linear_cross_entropy
from megakern.ops.norm import layer_norm, rms_norm
from megakern.ops.rope import rope


@dataclass(frozen=True)
class Options:
    """The arguments of `patch`."""

    parts: tuple[str, ...]
    backend: str | None


def _takes(x, *weights) -> bool:
    """May an op of ours take this input and these weights? Sharded ones and rarer mixes of dtypes stay with the model's
    own code."""
    return all(w is None or (w.dtype in (x.dtype, torch.float32) and not isinstance(w, DTensor)) for w in weights)


# --- norms and activations ---


class RMSNorm:
    def forward(self, hidden_states):
        if not _takes(hidden_states, self.weight):
            return super().forward(hidden_states)
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon, backend=self._megakern.backend)
        return y.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))


class LayerNorm:
    def forward(self, x):
        if not _takes(x, self.weight, self.bias):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps, backend=self._megakern.backend)


class GatedMLP:
    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), backend=self._megakern.backend))


class TanhGELU:
    def forward(self, x):
        return gelu(x, approximate="tanh", backend=self._megakern.backend)


class ExactGELU:
    def forward(self, x):
        return gelu(x, backend=self._megakern.backend)


# --- rotary positions ---


class Rotary:
    """cos and sin stay in fp32: Hugging Face rounds them to the dtype of the activations."""

    def forward(self, x, position_ids):
        return super().forward(x[..., :0].to(torch.promote_types(x.dtype, torch.float32)), position_ids)


class RotaryAttention:
    """Queries and keys are rotated as (B, T, H, D), before Hugging Face's transposition. `window`: what the class
    passes to its attention function beside the others."""

    def window(self):
        return {}

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **options):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(hidden_states).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, k, *position_embeddings, self._megakern.backend)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        home = sys.modules[self._unpatched.__module__]
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, home.eager_attention_forward)
        options.update(self.window())
        out, weights = attend(
            self, q, k, v, attention_mask, dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling, **options,
        )  # fmt: skip
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class WindowedAttention(RotaryAttention):
    def window(self):
        return {"sliding_window": self.sliding_window}


class MistralAttention(RotaryAttention):
    def window(self):
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


def _rotate(q, k, cos, sin, backend):
    """cos, sin (1 or B, T, D), fp32, each half of D the same."""
    d = cos.shape[-1] // 2
    tables = cos.flatten(0, 1)[:, :d], sin.flatten(0, 1)[:, :d]
    positions = None
    if cos.shape[0] > 1:
        positions = torch.arange(tables[0].shape[0], device=cos.device).view(cos.shape[:2])
    return rope(q, k, *tables, positions=positions, backend=backend)


# --- the loss ---


def causal_loss(
    hidden, head, labels, *, num_items_in_batch=None, ignore_index=-100, shift_labels=None, backend=None, **_
):
    """transformers' ForCausalLMLoss of the logits that are not made: token t is scored against label t + 1.

    hidden (B, T, C), head (V, C), labels (B, T) int64; shift_labels (B, T): already moved. The sum of row losses over
    `num_items_in_batch`, or their mean.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = linear_cross_entropy(
        hidden,
        head,
        shift_labels.to(hidden.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        backend=backend,
    )
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def head_refusal(model) -> str | None:
    """Why the loss of this model needs its logits, or None."""
    head = model.lm_head
    if type(head) is not torch.nn.Linear or "forward" in head.__dict__ or isinstance(head.weight, DTensor):
        return f"its lm_head is not a plain torch.nn.Linear but {type(head).__name__}, or is wrapped or sharded"
    if head.bias is not None or head._forward_hooks or head._forward_pre_hooks:
        return "its lm_head has a bias or hooks"
    # As transformers' `loss_function`, which logs, and a compiler cannot trace that.
    function = getattr(model, "_loss_function", None)
    function = function or LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    return None if function is ForCausalLMLoss else "it has a loss function of its own"


def _needs_logits(model, labels, logits_to_keep, options) -> bool:
    """Does this call ask for logits, or does the model want them? A tuple has them in a place of their own."""
    if labels is None or not model.training or not isinstance(logits_to_keep, int) or logits_to_keep != 0:
        return True
    if options.get("return_dict", getattr(model.config, "return_dict", True)) is False:
        return True
    return head_refusal(model) is not None


class CausalLM:
    """Llama and its relatives."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **options,
    ):
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache,
        }  # fmt: skip
        return _forward(CausalLM, CausalLMOutputWithPast, self, inputs, labels, logits_to_keep, options)


class GPT2CausalLM:
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **options,
    ):
        inputs = {
            "input_ids": input_ids, "past_key_values": past_key_values, "attention_mask": attention_mask,
            "token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask,
            "use_cache": use_cache,
        }  # fmt: skip
        kind = CausalLMOutputWithCrossAttentions
        return _forward(GPT2CausalLM, kind, self, inputs, labels, logits_to_keep, options)


def _forward(mixin, output, model, inputs, labels, logits_to_keep, options):
    """`forward` of a model with a head: in training, with labels, its loss alone (logits None); else as it was."""
    if not isinstance(model, mixin):  # held by a wrapper beyond unpatch, as accelerate's autocast does
        return type(model).forward(model, **inputs, labels=labels, logits_to_keep=logits_to_keep, **options)
    _refuse_probabilities(model, options)
    if labels is not None and inputs["use_cache"] is None and inputs["past_key_values"] is None:
        # No cache for a loss. And beside the new cache that it would make, Hugging Face's mask does not look for rows
        # whose positions start again: packed sequences would see each other, as they do without FlashAttention.
        inputs["use_cache"] = False
    if torch.compiler.is_compiling():
        _say_that_rows_are_whole(inputs, options)
    if "loss" not in model._megakern.parts or _needs_logits(model, labels, logits_to_keep, options):
        original = super(mixin, model).forward
        return original(**inputs, labels=labels, logits_to_keep=logits_to_keep, **options)
    body = model.base_model(**inputs, **options)
    loss = causal_loss(body.last_hidden_state, model.lm_head.weight, labels, backend=model._megakern.backend, **options)
    kept = ("past_key_values", "hidden_states", "attentions", "cross_attentions")
    return output(loss=loss, **{name: body[name] for name in kept if body.get(name) is not None})


def _refuse_probabilities(model, options) -> None:
    asked = options.get("output_attentions", getattr(model.config, "output_attentions", False))
    if asked and model.config._attn_implementation == "megakern":
        raise ValueError(
            "megakern: output_attentions was asked for, but the attention probabilities are never formed; "
            "mk.unpatch(model), or patch it with attention=False"
        )


def _say_that_rows_are_whole(inputs, options) -> None:
    """While it compiles, Hugging Face cannot tell one sequence a row from packed ones, and makes a mask of T x T. Where
    nothing was said of positions, a mask of ones says it."""
    silent = ("attention_mask", "position_ids", "past_key_values")
    tokens = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
    if tokens is not None and all(inputs[name] is None for name in silent) and "cu_seq_lens_q" not in options:
        inputs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
