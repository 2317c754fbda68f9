"""A gradient that is not finite on one rank: all ranks skip that step, many in a row end the run. Four gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megakern as mk
from megakern.config import GPTConfig
from megakern.parallel.blocks import local_of
from megakern.train.checkpoint import newest, verify
from megakern.train.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig, load_config
from megakern.train.launch import StopRequest
from megakern.train.metrics import read_metrics
from megakern.train.run import new_run
from megakern.train.trainer import NonFiniteError, Trainer
from tests.commands import finish, start

MODEL = GPTConfig(layers=2, width=32, heads=2, vocab_size=257, sequence_length=32, dropout=0.1)
BAD = float("nan"), float("inf"), float("-inf")


def bits(trainer: Trainer) -> list[bytes]:
    """Parameters, and moments where there are any, of this rank."""
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    tensors = [local_of(tensor) for tensor in (*trainer.model.parameters(), *states) if tensor.ndim]
    return [bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) for tensor in tensors]


def train(folder: str, tp: int, dp: int, bad_rank: int, name: str, bad_steps: tuple[int, ...], value: float) -> dict:
    """A run whose gradient of parameter `name` gets `value` on one rank alone, at these steps."""
    config = load_config(Path(folder) / "config.toml")
    trainer = Trainer(config, Path(folder), mk.ParallelContext.create(tp=tp, dp=dp))
    changed, original, gradients = [], trainer.train_step, trainer._gradients

    def broken():
        loss = gradients()
        if trainer.step in bad_steps and dist.get_rank() == bad_rank:
            local_of(trainer.model.get_parameter(name).grad).view(-1)[0] = value
        return loss

    def watched():
        before = bits(trainer)
        try:
            original()
        finally:
            changed.append(bits(trainer)[: len(before)] != before)

    trainer._gradients, trainer.train_step = broken, watched
    try:
        trainer.fit(StopRequest())
    except NonFiniteError as error:
        return {"changed": changed, "error": str(error), "step": trainer.step}
    return {"changed": changed, "updates": trainer.updates, "step": trainer.step}


def prepared(tiny_data, folder: Path, tp: int, dp: int, **settings) -> Path:
    config = RunConfig(
        model=MODEL,
        data=DataConfig(path=str(tiny_data)),
        parallel=ParallelConfig(tp=tp, dp=dp),
        optimizer=OptimizerConfig(lr=3e-3),
        train=TrainConfig(**{"steps": 5, "batch": 4, "precision": "fp32", **settings}),
    )
    new = new_run(config, folder, tp * dp)
    new.create()
    return folder


# A norm's weight is replicated over tp: each rank has a gradient of its own, and only one of them is broken.
@pytest.mark.promise("R7")
@pytest.mark.parametrize("name", ["norm.weight", pytest.param("blocks.1.mlp.fc1.weight", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("tp", "dp", "bad_rank"),
    [(2, 1, 1), (1, 2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 1, 0), (2, 2, 2)])],
)
def test_all_ranks_skip_the_same_step(ranks, tiny_data, tmp_path, trials, tp, dp, bad_rank, name):
    for index, value in enumerate(BAD):
        run = prepared(tiny_data, tmp_path / f"run{index}", tp, dp)
        trials()
        for result in ranks.run(train, tp * dp, str(run), tp, dp, bad_rank, name, (2,), value):
            assert result == {"changed": [True, True, False, True, True], "updates": 4, "step": 5}
        records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
        assert [record["skipped"] for record in records] == [False, False, True, False, False]
        assert records[2]["gradient_norm"] is None


@pytest.mark.promise("R7")
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_many_in_a_row_end_the_run_on_every_rank(ranks, tiny_data, tmp_path, tp, dp):
    run = prepared(tiny_data, tmp_path / "run", tp, dp, steps=9, save_every=2, max_skipped=3)
    for result in ranks.run(train, 2, str(run), tp, dp, 1, "norm.weight", tuple(range(4, 9)), BAD[0]):
        assert result["step"] == 7
        assert "not finite for 3 steps in a row" in result["error"]
        assert result["changed"] == [True] * 4 + [False] * 3


@pytest.mark.promise("R7")
def test_the_command_ends_with_its_own_code_and_keeps_the_last_good_checkpoint(tiny_data, tmp_path):
    """A learning rate that throws the weights so far that the next forward pass overflows."""
    run = prepared(tiny_data, tmp_path / "run", 1, 2, steps=50, max_skipped=2, save_every=1)
    text = (run / "config.toml").read_text().replace("lr = 0.003", "lr = 1e20")
    (run / "config.toml").write_text(text)
    output = finish(start("train", "--resume", run), code=3)
    assert "not finite for 2 steps in a row" in output
    assert "restart" not in output, "the same settings would fail in the same way again"
    assert verify(newest(run / "ckpt")) == []
