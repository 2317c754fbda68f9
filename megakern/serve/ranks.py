"""One model over several processes: rank 0 does what the command says, the others follow it step by step.

    rank 0     tells, before each step of the engine, what was asked of it since the last     (JSON, over gloo)
    others     do the same to an engine of their own, and meet rank 0 in the model's collectives

What a step does follows from the calls before it alone, so all ranks choose the same tokens; text is rank 0's business.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megakern.config import ConfigError, require
from megakern.data.files import DataError
from megakern.inference import Loaded, load_run
from megakern.model.beam import Hypothesis, beam_search
from megakern.model.engine import Engine, Request
from megakern.model.sampling import Sampling
from megakern.parallel import trace
from megakern.parallel.context import ParallelContext
from megakern.train import launch
from megakern.train.checkpoint import CheckpointError
from megakern.train.config import ParallelConfig
from megakern.train.processes import POLL, Ranks

IDLE = timedelta(days=30)
"""How long ranks wait for a request. One that died is noticed by the launcher, at once."""
GRACE = 2.0  # seconds for the others to end after the first


class Link:
    """Messages from rank 0 to the others."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=IDLE)

    def tell(self, message: dict[str, Any]) -> None:
        text = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
        self._send(torch.tensor([len(text)]))
        self._send(text)

    def hear(self) -> dict[str, Any]:
        text = torch.empty(int(self._send(torch.zeros(1, dtype=torch.int64))), dtype=torch.uint8)
        return json.loads(bytes(self._send(text).tolist()))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's values in place of the others'."""
        trace.collective("broadcast", tensor, self._group)
        dist.broadcast(tensor, 0, group=self._group)
        return tensor


class LedEngine(Engine):
    """Rank 0's engine: the others have one of the same sizes, which does the same."""

    def __init__(self, link: Link, model, **sizes) -> None:
        super().__init__(model, **sizes)
        self._link, self._said = link, []
        link.tell({"do": "engine", "sizes": sizes})

    def add(self, request: Request) -> int:
        key = super().add(request)
        self._said.append({"add": dataclasses.asdict(request)})
        return key

    def cancel(self, key: int) -> None:
        super().cancel(key)
        self._said.append({"cancel": key})

    def step(self):
        self._link.tell({"do": "step", "said": self._said})
        self._said = []
        return super().step()


@dataclasses.dataclass(frozen=True)
class LedModel(Loaded):
    """What rank 0 loaded, with the others behind it."""

    link: Link

    def engine(self, **sizes) -> Engine:
        return LedEngine(self.link, self.model, **sizes)

    def beam_search(self, prompt, **options) -> list[Hypothesis]:
        self.link.tell({"do": "beams", "prompt": list(prompt), "options": options})
        return super().beam_search(prompt, **options)


def follow(loaded: Loaded, link: Link) -> None:
    """What the other ranks do until rank 0 is done."""
    engine = None
    while (message := link.hear())["do"] != "end":
        if message["do"] == "engine":
            engine = Engine(loaded.model, **message["sizes"])
        elif message["do"] == "beams":
            try:
                beam_search(loaded.model, message["prompt"], **message["options"])
            except ConfigError:
                continue  # rank 0 says it
        else:
            for said in message["said"]:
                if "add" in said:
                    engine.add(Request(**{**said["add"], "sampling": Sampling(**said["add"]["sampling"])}))
                else:
                    engine.cancel(said["cancel"])
            engine.step()


def run_on(count: int, command: str, options: argparse.Namespace) -> int:
    """Do a command of megakern/serve/commands.py in `count` processes of this machine -> its exit code.

    Signals go to rank 0, which ends in its own way, and the others after it.
    """
    require(count >= 1, f"--nproc must be 1 or more, got {count}")
    with tempfile.TemporaryDirectory() as folder:
        job = {"command": command, "count": count, "options": _plain(options)}
        (Path(folder) / "job.json").write_text(json.dumps(job))
        ranks = Ranks(__name__, Path(folder), count)
        before = {
            number: signal.signal(number, lambda number, _frame: ranks.processes[0].send_signal(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            return _wait(ranks)
        finally:
            ranks.end()
            for number, handler in before.items():
                signal.signal(number, handler)


def _wait(ranks: Ranks) -> int:
    """The exit code of rank 0, or of another that failed before it."""
    while True:
        codes = [process.poll() for process in ranks.processes]
        ended = next((code for code in codes if code), codes[0])
        if ended is not None:
            end = time.monotonic() + GRACE
            while None in [process.poll() for process in ranks.processes] and time.monotonic() < end:
                time.sleep(POLL)
            return ended if ended >= 0 else launch.LOST
        time.sleep(POLL)


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    kept = {key: value for key, value in vars(options).items() if key not in ("run_command", "overrides")}
    return {key: {"path": str(value)} if isinstance(value, Path) else value for key, value in kept.items()}


def _options(table: dict[str, Any]) -> argparse.Namespace:
    values = {key: Path(each["path"]) if isinstance(each, dict) else each for key, each in table.items()}
    return argparse.Namespace(**values)


def work(folder: Path) -> int:
    """What each process does (megakern/train/processes.py)."""
    from megakern.serve import commands

    job = json.loads((folder / "job.json").read_text())
    options, rank = _options(job["options"]), int(os.environ["RANK"])
    if rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        parallel = launch.join(ParallelConfig(tp=job["count"], timeout=IDLE.total_seconds()))
        return _work(commands.COMMANDS[job["command"]], options, parallel)
    except (ConfigError, DataError, CheckpointError) as error:
        if rank == 0:
            print(f"megakern: {error}", file=sys.stderr, flush=True)
        code = launch.LOST if isinstance(error, CheckpointError) else launch.BAD_SETTINGS
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    os._exit(code)  # not by way of destroy_process_group: it can wait for ranks that wait for us


def _work(command, options: argparse.Namespace, parallel: ParallelContext) -> int:
    loaded, link = load_run(options.run, step=options.step, parallel=parallel), Link()
    if parallel.world_rank:
        follow(loaded, link)
        code = 0
    else:
        fields = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
        try:
            code = command(options, LedModel(**fields, link=link)) or 0
        except (ConfigError, DataError) as error:  # found before a step, so the others wait for a message
            print(f"megakern: {error}", file=sys.stderr, flush=True)
            code = launch.BAD_SETTINGS
        link.tell({"do": "end"})
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
