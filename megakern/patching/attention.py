"""Attention for Hugging Face models: the attention function "megakern", and the mask function that goes with it.

A model asks the mask function once a forward pass what its layers may see, and hands the answer to the attention
function of each layer. Without a mask function of its own an attention function gets None, padding or not: logits of
padded batches are then wrong in silence. Answers here:

    None                     causal, nothing is masked: as many keys as queries, or one query that sees all keys. (Masks
                             of PyTorch's, made by a larger model around this one, are None for more keys too: those of
                             a cache with room to spare, where the first query stands beside the first key)
    int32 (1, 1, 2, N + 1)   offsets of sequences among all B T queries and B S keys, the last query of each beside its
                             last key. A row of a padded batch is cut where padding begins and ends, a packed one where
                             its positions start again
    bool (B, 1, T, S)        any other mask: PyTorch's `scaled_dot_product_attention` computes it, as without the patch

(`generate` may ask for masks ahead and hand them in as the model's attention_mask: what has four dims passes as it is.)

Padding sees nothing and nothing sees it, so that its outputs are 0. That is what PyTorch gives padding on the left, the
last of which predicts a row's first token; on the right PyTorch lets it see the row, and only outputs at padding itself
differ. Under torch.compile values cannot be read, so a row with padding is cut into three, some of them empty, and a
mask with holes is an error at run time; packed rows without `cu_seq_lens_q` get a bool mask there.
"""

from __future__ import annotations

import logging

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from megakern.ops.attention import attention

log = logging.getLogger("megakern")
NAME = "megakern"
_logged: set[str] = set()


# --- masks ---


def mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    allow_is_causal_skip=None,
    use_vmap=False,
    device="cpu",
    **options,
):
    """What Hugging Face's mask functions compute, in the form of the table above.

    Queries are tokens q_offset ... q_offset + q_length - 1, keys kv_offset ... ; attention_mask (B, tokens), true for
    real ones. `mask_function` is causal, or causal with a window (which the attention function is told too), or one of
    them within packed sequences; with `use_vmap`, or without `allow_is_causal_skip`, it may be anything.
    """
    known = allow_is_causal_skip is not None and not use_vmap and not isinstance(q_offset, torch.Tensor)
    found = None
    if known and q_offset + q_length == kv_offset + kv_length:
        if q_length < kv_length:
            found = _beside_a_cache(batch_size, q_length, kv_length, kv_offset, attention_mask, device)
        elif attention_mask is None or attention_mask.shape[-1] == q_length:
            packed = None if allow_is_causal_skip else mask_function
            found = _of_whole_rows(batch_size, q_length, packed, attention_mask, device)
    if found is not None:
        return found[0]
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device, **options,
    )  # fmt: skip


def _beside_a_cache(B, T, S, kv_offset, attention_mask, device):
    """(None,) or (offsets,) where all keys are real, or None for a bool mask."""
    if attention_mask is not None:
        if torch.compiler.is_compiling() or attention_mask.shape[-1] < kv_offset + S:
            return None
        if not bool(attention_mask[:, kv_offset : kv_offset + S].all()):
            return None
    if T == 1:
        return (None,)
    row = torch.arange(B + 1, dtype=torch.int32, device=device)
    return (torch.stack([row * T, row * S])[None, None],)


def _of_whole_rows(B, T, packed, attention_mask, device):
    """(None,) or (offsets,), or None for a bool mask, of rows whose queries are all their keys."""
    real = None if attention_mask is None else attention_mask.to(device=device, dtype=torch.bool)
    if torch.compiler.is_compiling():
        if real is None:
            return (None,) if packed is None else None
        return (_three_parts(real),)
    linked = torch.ones(B, T, dtype=torch.bool, device=device)
    linked[:, :1] = False
    if packed is not None:  # a token that does not see the one before it starts a sequence
        rows, tokens = torch.arange(B, device=device)[:, None], torch.arange(1, T, device=device)[None]
        linked[:, 1:] &= packed(rows, torch.zeros_like(rows), tokens, tokens - 1)
    if real is not None:
        linked[:, 1:] &= real[:, 1:] == real[:, :-1]
        if bool((_runs(real) > 1).any()):
            return None
    starts = (~linked).flatten().nonzero().flatten()
    is_real = torch.ones_like(starts, dtype=torch.bool) if real is None else real.flatten()[starts]
    if len(starts) == B and bool(is_real.all()):
        return (None,)
    offsets = _offsets(starts, is_real, B * T)
    moves = (offsets.diff() > 0).flatten(0, 2).any(0)
    return (torch.cat([offsets[..., :1], offsets[..., 1:][..., moves]], -1),)


def _runs(real):
    """How many runs of real tokens a row has."""
    return real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(-1)


def _three_parts(real):
    """Offsets that cut each row into padding, real tokens, padding, with no value read."""
    torch._assert_async(
        (_runs(real) <= 1).all(),
        "megakern: this attention_mask has a hole, which a compiled model cannot take; pass a 4-d mask",
    )
    B, T = real.shape
    first = torch.arange(B, device=real.device) * T
    before = (real.cumsum(-1) == 0).sum(-1)
    starts = torch.stack([first, first + before, first + before + real.sum(-1)], -1).flatten()
    return _offsets(starts, torch.arange(3 * B, device=real.device) % 3 == 1, B * T)


def _offsets(starts, is_real, total):
    """Of runs of tokens that start there. Queries of padding are a sequence without keys, its keys one without queries:
    two sequences a run, one of them empty."""
    lengths = torch.cat([starts, starts.new_full((1,), total)]).diff()
    nothing = torch.zeros_like(lengths)
    queries = torch.stack([lengths, nothing], -1).flatten()
    keys = torch.stack([torch.where(is_real, lengths, 0), torch.where(is_real, 0, lengths)], -1).flatten()
    ends = torch.stack([queries, keys]).cumsum(-1)
    return torch.cat([ends.new_zeros(2, 1), ends], 1).to(torch.int32)[None, None]


# --- attention ---


def attend(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    is_causal=None, cu_seq_lens_q=None, cu_seq_lens_k=None, **options,
):  # fmt: skip
    """query (B, H, T, D), key and value (B, Hkv, S, D) -> out (B, T, H, D), None. `attention_mask` as above.

    Raises ValueError for what the op has no form of: asked-for probabilities, attention sinks, biases, paged caches.
    """
    for name in ("output_attentions", "s_aux", "position_bias", "cache"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(
                f"megakern: attention cannot take {name}; mk.unpatch(model), or patch it with attention=False"
            )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    compiling = torch.compiler.is_compiling()
    offsets = None
    if cu_seq_lens_q is not None:
        offsets = cu_seq_lens_q.to(torch.int32), (cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k).int()
    elif attention_mask is not None and attention_mask.dtype == torch.int32:
        offsets = attention_mask[0, 0].unbind()
    elif attention_mask is not None:
        if not compiling:
            _log_once("attention runs on PyTorch's scaled_dot_product_attention where a mask is not padding or packing")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    elif causal and 1 < query.shape[2] < key.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    window = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    if dropout and compiling:  # its seed is drawn on the host
        visible = _visible(query, offsets, window, causal)
        return sdpa_attention_forward(module, query, key, value, visible, dropout=dropout, scaling=scaling)
    tensors = [x.transpose(1, 2) for x in (query, key, value)]
    if offsets is not None:
        tensors = [x.flatten(0, 1) for x in tensors]
    options = getattr(module, "_megakern", None)
    out = attention(
        *tensors,
        causal=causal,
        window=window,
        softcap=softcap or 0.0,
        scale=scaling,
        dropout_p=dropout,
        # From PyTorch's generator on the host, which gradient checkpointing rewinds.
        seed=int(torch.randint(2**62, ())) if dropout else None,
        cu_seqlens=offsets,
        backend=None if options is None else options.backend,
    )
    return (out if offsets is None else out.unflatten(0, (query.shape[0], -1))), None


def _visible(query, offsets, window, causal):
    """The bool mask (B, 1, T, T) of None or offsets, in training: as many keys as queries."""
    B, _, T, _ = query.shape
    distance = torch.arange(T, device=query.device) - torch.arange(T, device=query.device)[:, None]
    left, right = window or (None, None)
    seen = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen = seen & (distance >= -left) & (distance <= right)
    seen = seen.expand(B, 1, T, T)
    if offsets is not None:
        token = torch.arange(B * T, device=query.device, dtype=torch.int32)
        own, others = (torch.searchsorted(ends, token, right=True).view(B, 1, T) for ends in offsets)
        seen = seen & (own[..., None] == others[..., None, :])
    return seen


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.info(message)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
