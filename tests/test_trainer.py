"""The training loop in one process: precisions, accumulation, recompute, bad gradients, full disk. No device needed."""

from __future__ import annotations

import dataclasses
import resource
import sys

import pytest
import torch

from megakern.cli import main
from megakern.config import ConfigError, GPTConfig
from megakern.data.files import DataError
from megakern.parallel.context import ParallelContext
from megakern.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from megakern.train.launch import StopRequest
from megakern.train.metrics import read_metrics
from megakern.train.run import new_run
from megakern.train.trainer import NonFiniteError, Trainer
from tests.commands import Command, finish

MODEL = GPTConfig(layers=2, width=32, heads=2, vocab_size=257, sequence_length=32, dropout=0.1)


@pytest.fixture
def make(tiny_data, tmp_path):
    """`make(name, **train settings)` -> a trainer of a new run."""

    def trainer(name: str = "run", optimizer: OptimizerConfig | None = None, **settings) -> Trainer:
        train = TrainConfig(**{"steps": 6, "batch": 4, "precision": "fp32", **settings})
        config = RunConfig(
            model=MODEL,
            data=DataConfig(path=str(tiny_data)),
            optimizer=optimizer or OptimizerConfig(lr=3e-3),
            train=train,
        )
        new = new_run(config, tmp_path / name, 1)
        new.create()
        return Trainer(new.config, new.run, ParallelContext())

    return trainer


def test_a_rank_that_starts_late_takes_the_new_run_for_its_own(make):
    trainer = make()
    assert new_run(trainer.config, trainer.run, 1, rank=1).run == trainer.run
    with pytest.raises(ConfigError, match="is a run already"):
        new_run(trainer.config, trainer.run, 1)


def losses(trainer: Trainer) -> list[float]:
    trainer.fit(StopRequest())
    return [r["loss"] for r in read_metrics(trainer.run / "metrics.jsonl") if r["kind"] == "train"]


def test_products_in_less_than_fp32_are_those_of_pytorch(make):
    """The same losses as with PyTorch's own switch, and fp32 again for the trainer after it."""
    wanted = {}
    for name in ("highest", "medium"):
        trainer = make(name, steps=2, matmul_precision=name)
        assert torch.get_float32_matmul_precision() == name
        wanted[name] = losses(trainer)
    trainer = make("switched", steps=2)
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("medium")
    try:
        assert losses(trainer) == wanted["medium"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert wanted["medium"] == pytest.approx(wanted["highest"], rel=1e-2)


def test_loss_falls_and_matches_an_ordinary_loop(make):
    """The same run written out with torch's own optimizer, schedule and clipping."""
    from megakern.data.loader import Loader
    from megakern.layers.dropout import DropoutKey
    from megakern.model.gpt import GPT

    trainer = make(steps=12)
    got = losses(trainer)
    settings = trainer.config
    model = GPT(MODEL, seed=settings.train.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=3e-4)
    loader = Loader(trainer.data.train, 32, settings.train.seed)
    expected = []
    for step in range(12):
        tokens, targets = loader.batch(step * 4, 4)
        key = DropoutKey(seed=settings.train.seed, step=step, first_sample=0)
        loss = model(tokens, targets, dropout_key=key)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    assert got == pytest.approx(expected, rel=1e-5)
    assert got[-1] < got[0] - 0.5


def test_accumulation_gives_the_gradient_of_the_whole_batch(make):
    assert losses(make("a", micro_batch=1)) == pytest.approx(losses(make("b")), rel=1e-5)


def test_recompute_is_bit_identical(make):
    assert losses(make("a", recompute="full")) == losses(make("b"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_follow_fp32(make, precision):
    low = losses(make("low", precision=precision, steps=12))
    assert low == pytest.approx(losses(make("fp32", steps=12)), abs=0.03)


def test_bf16_moments_follow_fp32(make):
    lean = OptimizerConfig(lr=3e-3, state_dtype="bfloat16")
    assert losses(make("lean", lean)) == pytest.approx(losses(make("fp32")), abs=0.02)


def test_intervals_of_logs_evaluations_and_saves_change_nothing(make):
    plain = losses(make("plain"))
    assert losses(make("busy", log_every=1, eval_every=2, save_every=1, eval_batches=1)) == plain


def poison(trainer: Trainer, steps: set[int]) -> None:
    """One gradient gets a NaN in each of these steps."""
    original = trainer._gradients

    def poisoned() -> torch.Tensor:
        loss = original()
        if trainer.step in steps:
            next(iter(trainer.model.parameters())).grad.view(-1)[3] = float("nan")
        return loss

    trainer._gradients = poisoned


def test_non_finite_gradient_skips_the_step_and_changes_nothing_else(make):
    trainer = make(steps=5)
    poison(trainer, {2})
    before, after = {}, {}
    original = trainer.train_step

    def watched() -> None:
        if trainer.step == 2:
            before.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        original()
        if trainer.step == 3:
            after.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})

    trainer.train_step = watched
    trainer.fit(StopRequest())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before
    records = [r for r in read_metrics(trainer.run / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["skipped"] for r in records] == [False, False, True, False, False]
    assert trainer.updates == 4


def test_too_many_skipped_steps_end_the_run(make):
    trainer = make(steps=9, max_skipped=3)
    poison(trainer, {4, 5, 6, 7, 8})
    with pytest.raises(NonFiniteError, match="not finite for 3 steps in a row"):
        trainer.fit(StopRequest())
    assert trainer.step == 7


def test_fp16_overflow_lowers_the_scale_and_training_goes_on(make):
    trainer = make(precision="fp16", steps=8)
    trainer.scaler.scale = 2.0**40
    scales = []
    original = trainer.train_step

    def watched() -> None:
        original()
        scales.append(trainer.scaler.scale)

    trainer.train_step = watched
    trainer.fit(StopRequest())
    assert scales[0] == 2.0**40
    assert scales[-1] < 2.0**40
    assert trainer.skipped_in_a_row > 0


def test_longer_runs_can_be_asked_for_later(make):
    """A finished run that is resumed with more steps goes on from its end."""
    trainer = make(steps=4, save_every=2)
    first = losses(trainer)
    longer = dataclasses.replace(trainer.config, train=dataclasses.replace(trainer.config.train, steps=8))
    again = Trainer(longer, trainer.run, ParallelContext())
    assert again.step == 4
    assert losses(again)[:4] == first
    assert again.step == 8


def train_on_a_small_disk(limit: int, words: list[str]) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(words)


def test_full_disk_ends_with_a_clear_message_and_keeps_the_older_checkpoint(make):
    trainer = make(steps=2)
    trainer.fit(StopRequest())
    limit = 50_000  # bytes a file may have: room for the metrics, not for a checkpoint

    process = Command(train_on_a_small_disk, limit, ["train", "--resume", str(trainer.run), "--train.steps", "4"])
    output = finish(process, code=1)
    assert "File too large" in output
    assert "ckpt" in output
    names = sorted(path.name for path in (trainer.run / "ckpt").iterdir() if path.is_dir())
    assert names == ["step-00000002"]


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_fp16_gradients_reach_the_optimizer_unscaled_and_clipped(make, clip):
    """Adam hides a factor on the gradient; its first moment shows it."""
    moments = {}
    for precision in ("fp16", "fp32"):
        trainer = make(f"{precision}-{clip}", OptimizerConfig(lr=3e-3, clip=clip), precision=precision, steps=1)
        trainer.train_step()
        moments[precision] = torch.cat([s["exp_avg"].flatten() for s in trainer.optimizer.state.values()])
    torch.testing.assert_close(moments["fp16"].norm(), moments["fp32"].norm(), rtol=0.01, atol=0)
    if clip:
        assert moments["fp32"].norm().item() == pytest.approx(
            0.1 * clip, rel=1e-3
        )  # (1 - beta1) x the clipped gradient


def test_a_step_waits_for_its_device_once(make, monkeypatch):
    """Every way from a tensor to a Python number would stop the queue of a GPU."""
    trainer = make(micro_batch=1, batch=4)
    read: list[str] = []

    def counted(name: str):
        original = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor):
            # The optimizer counts its steps on the CPU; tokens, and what kernels for CPUs read, are looked at there.
            on_the_cpu = any(tensor is state["step"] for state in trainer.optimizer.state.values())
            kernel = "/kernels/torch/" in sys._getframe(1).f_code.co_filename
            if not (on_the_cpu or kernel or tensor.dtype == torch.int64):
                read.append(name)
            return original(tensor)

        return method

    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    for _ in range(3):
        trainer.train_step()
    monkeypatch.undo()
    assert read == ["tolist"] * 3


def test_each_batch_is_read_once_ahead_and_its_error_comes_with_its_own_step(make):
    trainer = make(micro_batch=2, batch=4, steps=4)
    original, read = trainer.loader.batch, []

    def batch(first: int, count: int):
        read.append((trainer.step, first, count))
        if first == 8:
            raise DataError("sample 8 is bad")
        return original(first, count)

    trainer.loader.batch = batch
    with pytest.raises(DataError, match="sample 8 is bad"):
        trainer.fit(StopRequest())
    assert (trainer.step, trainer.updates) == (2, 2)
    assert read == [(0, 0, 2), (0, 2, 2), (0, 4, 2), (1, 6, 2), (1, 8, 2), (2, 8, 2)]
    trainer.loader.batch = original
    trainer.fit(StopRequest())
    whole = losses(make("whole", micro_batch=2, batch=4, steps=4))
    assert [r["loss"] for r in read_metrics(trainer.run / "metrics.jsonl") if r["kind"] == "train"] == whole


def test_what_was_prepared_is_taken_for_its_own_samples_alone(make):
    batches = make(batch=4).batches
    batches.prepare(4, 2)
    for first, count in ((0, 2), (4, 2), (4, 1)):
        for taken, there in zip(batches.take(first, count), batches.loader.batch(first, count), strict=True):
            assert torch.equal(taken, there)
        batches.prepare(4, 2)
