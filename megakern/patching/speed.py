"""`mk.SpeedCallback`: tokens a second and MFU in the logs of Hugging Face's `Trainer`.

Tokens are counted where the model is called, without padding, on the device, and read once a log. A token costs

    6 or 4 a weight of a matrix product         forward and backward; 4 where the weight is frozen, as under LoRA
    12 H D k a layer                            attention, full: k = min(window, s) keys in a sequence of s tokens
    12 H D (k - k^2 / 2 s)                      attention, causal

Embeddings, norms and what gradient checkpointing computes again do not count: see `megakern/model/flops.py`.
"""

from __future__ import annotations

import time
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn

from megakern.parallel import trace
from megakern.train import machine


class SpeedCallback:
    """`Trainer(..., callbacks=[mk.SpeedCallback()])` adds to each training log

        tokens_per_second    of all processes, padding not counted; evaluation and saving take no time here
        mfu, mfu_full        share of the peak, with attention counted where the causal mask lets it, and in full

    and to `trainer.state.log_history`. `Trainer` calls the reporters named in `report_to` before other callbacks, so
    they do not see these figures. peak_flops: of one process, in FLOP/s; default from the GPU's data sheet, or measured
    (0.3 s) on the CPU and in fp32. The model may be any whose config has the usual names.
    """

    def __init__(self, peak_flops: float | None = None):
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"SpeedCallback: peak_flops must be above 0, got {peak_flops}")
        self.peak_flops, self._hook = peak_flops, None

    def __getattr__(self, name: str):
        # Not a TrainerCallback by inheritance, so that megakern needs no transformers; its other events do nothing.
        if name.startswith("on_"):
            return lambda *args, **options: None
        raise AttributeError(f"SpeedCallback has no attribute {name!r}")

    # --- events ---

    def on_train_begin(self, args, state, control, model=None, **_):
        device = next(model.parameters()).device
        if self.peak_flops is None:
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else next(model.parameters()).dtype
            self.peak_flops, _ = machine.peak_rate(dtype, device)
        self._work = Work(model)
        self._counts = torch.zeros(1 + 2 * len(self._work.windows), dtype=torch.float64, device=device)
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._seconds, self._since = 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self._tick()

    def on_evaluate(self, args, state, control, **_):
        self._since = time.perf_counter()

    on_save = on_evaluate

    def on_log(self, args, state, control, logs=None, **_):
        if self._hook is None or logs is None or "loss" not in logs:
            return
        self._tick()
        counts = self._counts.clone()
        if dist.is_available() and dist.is_initialized():
            trace.collective("all_reduce", counts, None)
            dist.all_reduce(counts)
        tokens, *keys = counts.tolist()
        self._counts.zero_()
        causal, full = self._work.flops(tokens, keys)
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        available = self._seconds * self.peak_flops * processes
        found = {
            "tokens_per_second": tokens / self._seconds, "mfu": causal / available, "mfu_full": full / available
        }  # fmt: skip
        self._seconds = 0.0
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_train_end(self, args, state, control, **_):
        self._hook.remove()
        self._hook = None

    def _tick(self):
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now

    @torch.compiler.disable
    def _count(self, model, args, kwargs):
        if model.training:
            self._counts += self._work.count(sequence_lengths(*args[:1], **kwargs))


class Work:
    """What a model computes a token: weights of its matrix products, and attention by window."""

    def __init__(self, model: nn.Module):
        config = model.config
        # transformers' Conv1D, of GPT-2, has the weight of a linear layer transposed
        products = [m.weight for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        self.weights = sum(weight.numel() * (6 if weight.requires_grad else 4) for weight in products)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.channels = config.num_attention_heads * head_dim
        self.windows = Counter(_windows(config))

    def count(self, lengths: torch.Tensor) -> torch.Tensor:
        """Of sequences of these lengths: tokens, then for each window the keys that they see, causal and full."""
        s = lengths.double()
        parts = [s.sum()]
        for window in self.windows:
            k = s if window is None else s.clamp(max=window)
            parts += [(s * k - k * k / 2).sum(), (s * k).sum()]
        return torch.stack(parts)

    def flops(self, tokens: float, keys: list[float]) -> tuple[float, float]:
        """-> FLOPs of a step with these counts, causal and full."""
        pairs = list(zip(self.windows.values(), keys[::2], keys[1::2], strict=True))
        attention = (12 * self.channels * sum(layers * pair[i] for layers, *pair in pairs) for i in range(2))
        return tuple(tokens * self.weights + part for part in attention)


def _windows(config) -> list[int | None]:
    """Of each layer."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def sequence_lengths(
    input_ids=None, *, inputs_embeds=None, attention_mask=None, position_ids=None, cu_seq_lens_q=None, **_
) -> torch.Tensor:
    """Tokens of each sequence in a call of the model, padding not counted; empty ones may be among them."""
    tokens = input_ids if input_ids is not None else inputs_embeds
    B, T = tokens.shape[:2]
    if cu_seq_lens_q is not None:
        return cu_seq_lens_q.diff()
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask.sum(-1)
    if position_ids is None:
        return torch.full((B,), T, device=tokens.device)
    starts = torch.ones(B, T, dtype=torch.long, device=tokens.device)
    starts[:, 1:] = position_ids.expand(B, T).diff() != 1
    lengths = torch.zeros(B * T, dtype=torch.long, device=tokens.device)
    return lengths.scatter_add_(0, starts.flatten().cumsum(0) - 1, torch.ones_like(lengths))
