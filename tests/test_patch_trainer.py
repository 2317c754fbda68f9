"""Patched models under Hugging Face's `Trainer`: the same curves; and `mk.SpeedCallback`. No device needed."""

from __future__ import annotations

import copy

import pytest
import torch

import megakern as mk
from megakern.config import GPTConfig
from megakern.model.flops import flops_per_token
from megakern.patching import speed
from tests.hugging import LAYERS, V, make, transformers

pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install megakern[dev]")

STEPS, ROWS = 20, 4


class Sentences(torch.utils.data.Dataset):
    """Counting sequences of 5 to 20 tokens, after a prompt without labels, so that rows differ in what they count."""

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        length, first = 5 + i % 16, int(torch.randint(1, V, (), generator=g))
        tokens = (first + torch.arange(length)) % V
        labels = tokens.clone()
        labels[: i % 4] = -100
        return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def padded(rows):
    """On the right, every second batch on the left."""
    longest = max(len(row["input_ids"]) for row in rows)
    left = len(rows[0]["input_ids"]) % 2
    blank = {"input_ids": 0, "labels": -100, "attention_mask": 0}

    def pad(x, value):
        room = longest - len(x)
        return torch.nn.functional.pad(x, (room, 0) if left else (0, room), value=value)

    return {name: torch.stack([pad(row[name], value) for row in rows]) for name, value in blank.items()}


def train(model, folder, *, callbacks=(), steps=STEPS, **settings) -> list[dict]:
    """-> the logs of each step."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=steps, per_device_train_batch_size=ROWS, logging_steps=1,
        learning_rate=3e-3, lr_scheduler_type="constant", seed=7, report_to="none", save_strategy="no",
        disable_tqdm=True, dataloader_num_workers=0, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Sentences(), data_collator=padded, callbacks=list(callbacks)
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def curves(family, folder, **settings):
    """Losses and gradient norms of an unpatched and of a patched model."""
    plain = make(family)
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    logs = [train(model, folder, **settings) for model in (plain, patched)]
    return [torch.tensor([[log["loss"], float(log["grad_norm"])] for log in each]) for each in logs]


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {"gradient_accumulation_steps": 2}),
        ("gpt2", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("qwen3", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("mistral", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, "steps": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_curve_is_the_same(family, settings, tmp_path):
    expected, found = curves(family, tmp_path, **settings)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(found[:3], expected[:3], rtol=2e-5, atol=1e-5)
    if len(expected) == STEPS:
        assert expected[-3:, 0].mean() < 0.8 * expected[0, 0], "the steps must change the model"


def test_bf16_autocast_and_evaluation(tmp_path):
    """Under autocast the curve is the same to rounding; then it unpatches, though a wrapper holds its forward."""
    expected, found = curves("llama", tmp_path, bf16=True, steps=8)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=2e-2, atol=2e-2)
    model = make("llama")
    mk.patch(model)
    train(model, tmp_path, bf16=True, steps=1)
    inputs = padded([Sentences()[3], Sentences()[8]])
    mk.unpatch(model)
    assert type(model) is transformers.LlamaForCausalLM
    assert model(**inputs).logits.shape[-1] == V
    patched = make("llama").eval()
    mk.patch(patched)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=4
    )
    rows = [Sentences()[i] for i in range(8)]
    seen = []
    trainer = transformers.Trainer(
        model=patched, args=arguments, data_collator=padded, eval_dataset=rows,
        compute_metrics=lambda found: seen.append(found.predictions.shape[-1]) or {},
    )  # fmt: skip
    loss = trainer.evaluate()["eval_loss"]
    mk.unpatch(patched)
    assert seen == [V] and loss == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)


# --- the callback ---


def test_speed_in_the_logs(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    model = make("mistral")
    mk.patch(model)
    calls = []
    model.register_forward_pre_hook(lambda m, args, inputs: calls.append(inputs["attention_mask"]), with_kwargs=True)
    callback = mk.SpeedCallback(peak_flops=1e9)
    logs = train(model, tmp_path, callbacks=[callback], steps=3, gradient_accumulation_steps=2)
    assert len(logs) == 3 and len(calls) == 6
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    for i, log in enumerate(logs):
        lengths = [int(n) for mask in calls[2 * i : 2 * i + 2] for n in mask.sum(-1)]
        # A second passes at each look at the clock: at the end of the step, and at its log.
        assert log["tokens_per_second"] == sum(lengths) / 2
        keys = sum(n * min(n, 5) for n in lengths)
        halves = sum(n * min(n, 5) - min(n, 5) ** 2 / 2 for n in lengths)
        for name, pairs in (("mfu", halves), ("mfu_full", keys)):
            flops = 6 * weights * sum(lengths) + 12 * LAYERS * 6 * 8 * pairs
            assert log[name] == pytest.approx(flops / 2e9, rel=1e-9)
    assert len(model._forward_pre_hooks) == 1, "its own hook is gone"


def test_flops_are_those_of_this_project():
    model, T = make("llama"), 24
    work = speed.Work(model)
    counts = work.count(torch.full((3,), T)).tolist()
    config = GPTConfig(
        layers=LAYERS, width=48, heads=6, kv_heads=2, ffn_size=80, vocab_size=V, sequence_length=T, norm="rmsnorm",
        activation="swiglu", positions="rope", bias=False, tied_embeddings=False,
    )  # fmt: skip
    for found, causal in zip(work.flops(counts[0], counts[1:]), (True, False), strict=True):
        assert found == pytest.approx(3 * T * flops_per_token(config, causal=causal), rel=1e-12)
    model.lm_head.weight.requires_grad_(False)
    assert speed.Work(model).weights == work.weights - 2 * 48 * V, "a frozen weight has no gradient to compute"
    conv = make("gpt2")
    assert speed.Work(conv).weights == 6 * (LAYERS * 12 * 48**2 + 48 * V)


def test_lengths_of_sequences():
    tokens = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    assert speed.sequence_lengths(tokens).tolist() == [6, 6]
    assert speed.sequence_lengths(inputs_embeds=torch.zeros(2, 6, 3), attention_mask=mask).tolist() == [4, 5]
    assert speed.sequence_lengths(tokens, position_ids=positions).tolist()[:4] == [3, 2, 1, 6]
    assert speed.sequence_lengths(tokens, cu_seq_lens_q=offsets).tolist() == [5, 7]


def test_the_callback_takes_the_measured_peak_and_refuses_a_wrong_one(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        speed.machine, "peak_rate", lambda dtype, device: asked.append((dtype, device.type)) or (5e9, "")
    )
    callback = mk.SpeedCallback()
    train(make("gpt2"), tmp_path, callbacks=[callback], steps=1, bf16=True)
    assert asked == [(torch.bfloat16, "cpu")] and callback.peak_flops == 5e9
    with pytest.raises(ValueError, match="SpeedCallback: peak_flops must be above 0, got 0"):
        mk.SpeedCallback(peak_flops=0)
    with pytest.raises(AttributeError, match="SpeedCallback has no attribute 'speed'"):
        _ = callback.speed
