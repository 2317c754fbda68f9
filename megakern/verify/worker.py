"""What each process of a layout does: train with the Trainer, and compare with the reference, a parameter at a time.

FOLDER/config.toml    the settings of this run         FOLDER/job.json      {"steps", "backend", "reference"}
FOLDER/metrics.jsonl  written by the Trainer           FOLDER/result.json   written by rank 0 at the end

The reference run (its job's "reference" is null) writes its weights and gradients beside them as .safetensors. Only one
whole parameter is held at a time, on rank 0's side of a gather that all ranks join.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from megakern.ops import dispatch
from megakern.parallel.context import ParallelContext
from megakern.train.config import load_config
from megakern.train.metrics import read_metrics
from megakern.train.trainer import Trainer

SMALL = 1e-3
"""A parameter whose gradient is below this part of its share of the whole is measured against that part: gradients that
are zero but for rounding (a key's bias under softmax) have no digits to compare."""


@dataclass
class Distance:
    """Squared distances of tensors from a reference, added up a parameter at a time."""

    apart: dict[str, float] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: torch.Tensor, reference: torch.Tensor) -> None:
        value, reference = value.double(), reference.to(value.device).double()
        self.apart[name] = (value - reference).square().sum().item()
        self.reference[name] = reference.square().sum().item()
        self.elements[name] = value.numel()

    def relative(self) -> float:
        """L2 of the differences over L2 of the reference."""
        return _ratio(sum(self.apart.values()), sum(self.reference.values()))

    def worst(self) -> tuple[str, float]:
        """The parameter that is farthest off, relative to its own norm, or to `SMALL` of its share of the whole."""
        share = SMALL**2 * sum(self.reference.values()) / sum(self.elements.values())
        each = {
            name: _ratio(apart, max(self.reference[name], share * self.elements[name]))
            for name, apart in self.apart.items()
        }
        return max(each.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def _ratio(above: float, below: float) -> float:
    if below == 0:
        return 0.0 if above == 0 else math.inf
    return math.sqrt(above / below)


def run_rank(folder: Path, parallel: ParallelContext) -> None:
    """Do the job in `folder` as one of the ranks of `parallel`."""
    job = json.loads((folder / "job.json").read_text())
    reference = None if job["reference"] is None else Path(job["reference"])
    with _log(folder, parallel.world_rank), only_backend(job["backend"]):
        trainer = Trainer(load_config(folder / "config.toml"), folder, parallel)
        compare = _Comparison(trainer, folder, reference)
        compare.initial()
        with compare.first_gradients():
            trainer.train_step()
        for _ in range(1, job["steps"]):
            trainer.train_step()
        compare.final()
        parallel.barrier()
    if parallel.world_rank == 0:
        steps = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
        result = {
            "losses": [record["loss"] for record in steps],
            "norms": [record["gradient_norm"] for record in steps],
            **compare.found,
        }
        (folder / "result.json").write_text(json.dumps(result))


class _Comparison:
    """Writes what the reference run has, or measures how far this run is from it."""

    def __init__(self, trainer: Trainer, folder: Path, reference: Path | None) -> None:
        self.trainer, self.folder, self.reference = trainer, folder, reference
        self.first = trainer.parallel.world_rank == 0
        self.found: dict[str, object] = {}

    def initial(self) -> None:
        weights = self._weights()
        if self.reference is None:
            self._write("initial", weights)
            return
        differ = [name for name, value, expected in self._pairs("initial", weights) if not torch.equal(value, expected)]
        self.found["initial"] = differ[0] if differ else None

    @contextlib.contextmanager
    def first_gradients(self) -> Iterator[None]:
        """Look at the gradients of the step within the block, summed over ranks, before clipping and the update."""
        handle = self.trainer.optimizer.register_step_pre_hook(lambda *_: self._gradients())
        yield
        handle.remove()

    def _gradients(self) -> None:
        scaler = self.trainer.scaler
        scale = 1.0 if scaler is None else scaler.scale
        gradients = {name: p.grad for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        if self.reference is None:
            self._write("gradients", gradients)
            return
        distance = Distance()
        for name, value, expected in self._pairs("gradients", gradients):
            distance.add(name, value.double() / scale, expected)
        if self.first:
            worst, far = distance.worst()
            self.found.update(gradient=distance.relative(), worst=worst, parameter=far)

    def final(self) -> None:
        weights = self._weights()
        if self.reference is None:
            self._write("final", weights)
            return
        distance = Distance()
        with safe_open(self.reference / "initial.safetensors", "pt") as start:
            for name, value, expected in self._pairs("final", weights):
                before = start.get_tensor(name).double()
                distance.add(name, value.cpu().double() - before, expected.double() - before)
        self.found["update"] = distance.relative() if self.first else None

    def _weights(self) -> dict[str, torch.Tensor]:
        return dict(self.trainer.model.named_parameters())

    def _write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        whole = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(whole, self.folder / f"{name}.safetensors")

    def _pairs(self, kind: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, whole tensor, the reference's) on rank 0; the other ranks only take part in the gathers.

        Raises KeyError when the parameters are not those of the reference.
        """
        with safe_open(self.reference / f"{kind}.safetensors", "pt") as expected:
            missing = set(expected.keys()) ^ set(tensors)
            if missing:
                raise KeyError(f"parameters that only one of run and reference has: {', '.join(sorted(missing))}")
            # Each rank's PyTorch says of tp with dp that two gathers are slow. They are, once a tensor of a comparison.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
            for name, tensor in tensors.items():
                whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
                if self.first:
                    yield name, whole.cpu(), expected.get_tensor(name)


@contextlib.contextmanager
def only_backend(name: str) -> Iterator[None]:
    """Run the ops that backend `name` has on it, and the others as always; "auto": the automatic choice everywhere."""
    with contextlib.ExitStack() as stack:
        for op in () if name == "auto" else dispatch.ops_of(name):
            stack.enter_context(dispatch.use_backend(name, op=op))
        yield


@contextlib.contextmanager
def _log(folder: Path, rank: int) -> Iterator[None]:
    """What the Trainer says goes to a file: the terminal has the table."""
    with (folder / f"rank-{rank}.log").open("w") as file, contextlib.redirect_stdout(file):
        yield
