"""Help for tests that train in this process: a tiny run made in one call, and what its end is compared by."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megakern.config import GPTConfig
from megakern.parallel.context import ParallelContext
from megakern.train import checkpoint
from megakern.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from megakern.train.launch import StopRequest
from megakern.train.metrics import read_metrics
from megakern.train.run import NewRun
from megakern.train.trainer import Trainer

MODEL = GPTConfig(layers=1, width=16, heads=2, vocab_size=257, sequence_length=16, dropout=0.1)
SMALL = {"width": 32, "heads": 4, "layers": 2, "vocab_size": 60, "vocab_multiple": 32, "sequence_length": 16}
FAMILIES = {
    "gpt2": GPTConfig(**SMALL, dropout=0.1),
    "llama": GPTConfig(
        **SMALL, dropout=0.1, kv_heads=4, ffn_size=48, norm="rmsnorm", activation="swiglu", positions="rope",
        bias=False, tied_embeddings=False, qk_norm=True,
    ),
}  # fmt: skip


def config_of(data: Path, model: GPTConfig = MODEL, **train) -> RunConfig:
    """`data`: a folder of the byte tokenizer; `train`: settings of `TrainConfig`."""
    train = {"steps": 6, "batch": 4, "precision": "fp32", "save_every": 1, "keep": 1000, **train}
    return RunConfig(
        model=model,
        data=DataConfig(path=str(data)),
        optimizer=OptimizerConfig(lr=3e-3),
        train=TrainConfig(**train),
    )


def open_trainer(run: Path, config: RunConfig, parallel: ParallelContext | None = None) -> Trainer:
    """A trainer of `run`: of a new one, or from its newest checkpoint on. One process makes the folder."""
    parallel = parallel or ParallelContext()
    if parallel.world_rank == 0 and not (run / "config.toml").exists():
        NewRun(config, run).create()
    parallel.barrier()
    return Trainer(config, run, parallel)


def train(run: Path, config: RunConfig, parallel: ParallelContext | None = None) -> Trainer:
    """Runs to the end of `config`, or goes on with what is there."""
    trainer = open_trainer(run, config, parallel)
    assert trainer.fit(StopRequest()) == 0
    return trainer


def losses(run: Path, kind: str = "train") -> dict[int, float]:
    """Step -> loss of training, or kind "eval" of the held-out tokens."""
    return {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind}


def digest(path: Path) -> str:
    """SHA-256 over the shards of one checkpoint and the state that a run goes on from."""
    manifest = checkpoint.read_manifest(path)
    hashed = hashlib.sha256()
    for name in sorted(manifest.files):
        hashed.update((path / name).read_bytes())
    hashed.update(repr(sorted((key, value) for key, value in manifest.state.items() if key != "config")).encode())
    return hashed.hexdigest()


def digests(run: Path) -> dict[str, str]:
    """Of each checkpoint of a run."""
    return {path.name: digest(path) for path in sorted((run / "ckpt").glob("step-*"))}
