"""Training with each `optimizer.master`: the same bits, exact resumes, other layouts, the bytes that are announced."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import megakern as mk
from megakern.config import ConfigError, GPTConfig
from megakern.inference import load_run
from megakern.kernels.torch.adamw import join_master, split_master
from megakern.parallel.blocks import local_of
from megakern.parallel.collectives import finish_gradients
from megakern.parallel.context import ParallelContext
from megakern.train.checkpoint import CheckpointError
from megakern.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from megakern.train.launch import StopRequest
from megakern.train.metrics import read_metrics
from megakern.train.run import new_run
from megakern.train.state_bytes import StateBytes, parameter_shapes, state_bytes
from megakern.train.trainer import Trainer

ROPE = {"positions": "rope", "norm": "rmsnorm", "bias": False, "activation": "swiglu", "tied_embeddings": False}
MODEL = GPTConfig(layers=2, width=32, heads=2, vocab_size=257, sequence_length=32, dropout=0.1, **ROPE)
MASTERS = ["none", "fp32", "split"]
SLOW = pytest.mark.slow


def settings(data: Path, master: str, *, model: GPTConfig = MODEL, precision: str = "bf16", **optimizer) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(path=str(data)),
        optimizer=OptimizerConfig(lr=3e-3, master=master, **optimizer),
        train=TrainConfig(steps=6, batch=4, micro_batch=2, precision=precision),
    )


def start(config: RunConfig, run: Path) -> Trainer:
    new = new_run(config, run, 1)
    new.create()
    return Trainer(new.config, new.run, ParallelContext())


def losses(trainer: Trainer) -> list[float]:
    trainer.fit(StopRequest())
    return [r["loss"] for r in read_metrics(trainer.run / "metrics.jsonl") if r["kind"] == "train"]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every rank; gloo has no int16."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    wide = tensor.detach().to(torch.int32) if tensor.dtype == torch.int16 else tensor.detach()
    return wide.full_tensor().to(tensor.dtype).clone()  # of a replicated tensor it would be the memory itself


def masters(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The fp32 value of each parameter, however it is kept."""
    values = {}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        if "low" in state:
            values[name] = join_master(full(parameter), full(state["low"]))
        else:
            values[name] = full(state.get("master", parameter))
    return values


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_split_and_whole_masters_train_the_same_bits(tiny_data, tmp_path, state_dtype):
    whole = start(settings(tiny_data, "fp32", state_dtype=state_dtype), tmp_path / "fp32")
    split = start(settings(tiny_data, "split", state_dtype=state_dtype), tmp_path / "split")
    expected = losses(whole)
    assert losses(split) == expected
    same(masters(split), masters(whole))
    assert expected[-1] < expected[0] - 0.2
    for name, parameter in split.model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, split_master(masters(split)[name])[0])


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_start_is_that_of_fp32_parameters(tiny_data, tmp_path, master):
    """Masters start from the bits of fp32 parameters, and the first loss is the same to the bit: with rope, both are
    read as the same bf16 weights. (Ties, which round in another way, would change it: there must be none.)"""
    plain = start(settings(tiny_data, "none"), tmp_path / "none")
    lean = start(settings(tiny_data, master), tmp_path / master)
    initial = {name: parameter.detach().clone() for name, parameter in plain.model.named_parameters()}
    same(masters(lean), initial)
    assert not any((value.view(torch.int32) & 0xFFFF == 0x8000).any() for value in initial.values())
    assert any((value.bfloat16() != value).any() for value in initial.values())
    expected, got = losses(plain), losses(lean)
    assert got[0] == expected[0]
    assert got == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("master", MASTERS)
def test_resume_goes_on_bit_for_bit(tiny_data, tmp_path, master):
    straight = start(settings(tiny_data, master), tmp_path / "straight")
    losses(straight)
    stopped = start(settings(tiny_data, master), tmp_path / "stopped")
    for _ in range(3):
        stopped.train_step()
    stopped.save(last=True)
    resumed = Trainer(stopped.config, stopped.run, ParallelContext())
    assert resumed.step == 3
    same(masters(resumed), masters(stopped))
    losses(resumed)
    same(masters(resumed), masters(straight))


def test_another_master_is_refused_with_the_dtypes(tiny_data, tmp_path):
    trainer = start(settings(tiny_data, "split"), tmp_path / "run")
    trainer.train_step()
    trainer.save(last=True)
    other = dataclasses.replace(trainer.config, optimizer=OptimizerConfig(master="fp32"))
    with pytest.raises(CheckpointError, match=r"optimizer\.low|optimizer\.master"):
        Trainer(other, trainer.run, ParallelContext())


def test_generation_reads_the_stored_weights(tiny_data, tmp_path):
    trainer = start(settings(tiny_data, "split"), tmp_path / "run")
    losses(trainer)
    loaded = load_run(tmp_path / "run")
    same(
        {name: parameter.detach() for name, parameter in loaded.model.named_parameters()},
        {name: parameter.detach() for name, parameter in trainer.model.named_parameters()},
    )


def train_on_ranks(config: RunConfig, run: str) -> tuple[dict, dict, int, int]:
    trainer = Trainer(config, Path(run), ParallelContext.create(tp=dist.get_world_size()))
    before = masters(trainer)
    trainer.train_step()
    trainer.save(last=True)
    trainer._gradients()
    return before, masters(trainer), allocated(trainer), announced(trainer).total


def allocated(trainer: Trainer) -> int:
    """Bytes of the storages behind parameters, gradients and the optimizer's states, without its step counters."""
    tensors = []
    for parameter in trainer.model.parameters():
        tensors += [parameter, parameter.grad]
        tensors += [state for name, state in trainer.optimizer.state[parameter].items() if name != "step"]
    storages = [local_of(tensor).untyped_storage() for tensor in tensors]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    return sum(storage.nbytes() for storage in storages)


def announced(trainer: Trainer) -> StateBytes:
    parallel = trainer.parallel
    layout = {"tp": parallel.tp_size, "dp": parallel.size("dp"), "shard": parallel.rank("dp")}
    return state_bytes(trainer.config.model, trainer.config.optimizer, **layout)


@pytest.mark.parametrize("master", MASTERS)
def test_other_numbers_of_ranks_go_on_from_the_same_bits(ranks, tiny_data, tmp_path, master):
    """1 -> 2 -> 1 processes; on the way, what is allocated on each of two ranks is what is announced."""
    alone = start(settings(tiny_data, master), tmp_path / "run")
    alone.train_step()
    alone.save(last=True)
    results = ranks.run(train_on_ranks, 2, alone.config, str(alone.run))
    for before, _, held, said in results:
        same(before, masters(alone))
        assert held == said
    again = Trainer(alone.config, alone.run, ParallelContext())
    assert again.step == 2
    same(masters(again), results[0][1])


# --- data parallel ---


def gradients_on_ranks(config: RunConfig, run: str, tp: int) -> dict[str, torch.Tensor]:
    """The whole gradient of each parameter after one step's micro-batches, as the optimizer gets it."""
    dp = dist.get_world_size() // tp if dist.is_initialized() else 1
    parallel = ParallelContext.create(tp=tp, dp=dp) if dp > 1 else ParallelContext()
    trainer = Trainer(config, Path(run), parallel)
    trainer._gradients()
    finish_gradients(trainer.model.parameters())
    said = announced(trainer)
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert sum(local_of(gradient).nbytes for gradient in gradients.values()) == said.gradient * said.parameters
    return {name: full(gradient) for name, gradient in gradients.items()}


@pytest.mark.parametrize(
    "tp, zero, master", [(1, 1, "split"), (1, 2, "fp32"), (1, 3, "split"), pytest.param(2, 2, "split", marks=SLOW)]
)
def test_gradients_of_data_parallel_ranks_are_fp32(ranks, tiny_data, tmp_path, tp, zero, master):
    """The same micro-batches in one process and on two dp ranks: their sums differ by fp32 rounding, not by bf16's."""
    config = settings(tiny_data, master)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch=8),
        parallel=dataclasses.replace(config.parallel, zero=zero),
    )
    new_run(config, tmp_path / "run", 1).create()
    expected = gradients_on_ranks(config, str(tmp_path / "run"), 1)
    for found in ranks.run(gradients_on_ranks, 2 * tp, config, str(tmp_path / "run"), tp):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32, name
            apart = torch.dist(gradient, expected[name]) / expected[name].norm()
            assert apart < (1e-6 if tp == 1 else 0.02), f"{name}: {apart:.1e}"  # tp rounds other partial sums to bf16


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("master", MASTERS)
def test_announced_bytes_are_allocated(tiny_data, tmp_path, capsys, master, state_dtype):
    trainer = start(settings(tiny_data, master, state_dtype=state_dtype), tmp_path / "run")
    trainer.train_step()
    trainer._gradients()
    assert allocated(trainer) == announced(trainer).total
    each = {"none": 8, "fp32": 10, "split": 8}[master] + (8 if state_dtype == "float32" else 4)
    assert f"states: {each} bytes a parameter (weight " in capsys.readouterr().out


MODELS = [
    MODEL,
    GPTConfig(layers=3, width=48, heads=4, vocab_size=100, sequence_length=16),
    GPTConfig(layers=1, width=32, heads=4, kv_heads=2, head_dim=6, qk_norm=True, qkv_bias=True, **ROPE),
    GPTConfig(layers=2, width=32, heads=4, ffn_size=40, positions="none", parallel_residual=True, bias=False),
]


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_those_of_the_model(model):
    real = [tuple(parameter.shape) for parameter in mk.GPT(model, device="meta").parameters()]
    assert sorted(shape for shape, _ in parameter_shapes(model)) == sorted(real)


def count_on_ranks(model: GPTConfig, tp: int) -> tuple[int, int]:
    shards = dist.get_world_size() // tp
    parallel = ParallelContext.create(tp=tp)
    gpt = mk.GPT(model, parallel, device="meta")
    for block in gpt.blocks:
        fully_shard(block, mesh=parallel.mesh["dp"])
    fully_shard(gpt, mesh=parallel.mesh["dp"])
    held = sum(parameter.to_local().numel() for parameter in gpt.parameters())
    said = state_bytes(model, OptimizerConfig(), tp=tp, dp=shards, shard=parallel.rank("dp"))
    return held, said.parameters


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", [MODEL, MODELS[1]], ids=["rope", "learned"])
def test_shards_are_those_of_fsdp(ranks, model, tp):
    results = ranks.run(count_on_ranks, 4 if tp == 2 else 3, model, tp)
    assert all(held == said for held, said in results), results


def test_bytes_of_a_large_model_need_no_model():
    model = mk.presets["megatron-8.3b"]
    lean = state_bytes(model, OptimizerConfig(master="split", state_dtype="bfloat16"), tp=8, dp=64)
    assert lean.each == 12
    assert lean.total == pytest.approx(12 * 8.3e9 / 512, rel=0.02)


@pytest.mark.parametrize(
    "master, precision, message",
    [
        ("split", "fp16", r"optimizer.master = 'split' needs train.precision bf16, got fp16"),
        ("split", "fp32", r"optimizer.master = 'split' needs train.precision bf16, got fp32"),
        ("fp32", "fp32", r"optimizer.master = 'fp32' needs train.precision bf16 or fp16, got fp32"),
    ],
)
def test_precisions_without_masters_are_refused(master, precision, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(optimizer=OptimizerConfig(master=master), train=TrainConfig(precision=precision))


def test_unknown_master_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.master must be one of none, fp32, split, got 'half'"):
        OptimizerConfig(master="half")
