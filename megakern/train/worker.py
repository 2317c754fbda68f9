"""One process of a run: `python -m megakern.train.worker RUN`, or a fork that does `work`. Started by `megakern train`.

All is imported here and nothing in `work`, so that forks share it.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist

from megakern.config import ConfigError
from megakern.data.files import DataError
from megakern.train import launch, watch
from megakern.train.agreement import DivergedError
from megakern.train.checkpoint import CheckpointError
from megakern.train.config import load_config
from megakern.train.run import NewRun
from megakern.train.trainer import NonFiniteError, Trainer


def work(run: Path, new: NewRun | None = None) -> int:
    """Join the world, train RUN from its newest checkpoint (or from the start), and return the exit code.

    `new`: the run whose folder rank 0 makes first; None when the launcher has made it. After an error that the other
    ranks may not have, this process ends here and now: they may wait for it, and it must not wait for them.
    """
    world = launch.joined_world()
    rank = int(world["RANK"]) if world else 0
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="megakern: %(message)s")
    stop = launch.StopRequest()
    stop.listen()
    try:
        with new.locked() if new is not None and rank == 0 else nullcontext():
            if new is not None and rank == 0:
                new.create()
            settings = load_config(run / "config.toml").parallel if new is None else new.config.parallel
            parallel = launch.join(settings)
            parallel.barrier()
            watch.begin(run, rank, parallel.world_size)
            trainer = Trainer(load_config(run / "config.toml"), run, parallel)
            signal_number = trainer.fit(stop)
            parallel.barrier()
            if dist.is_initialized():
                dist.destroy_process_group()
            return 128 + signal_number if signal_number else 0
    except (ConfigError, DataError) as error:
        kind, code, cause = "settings", launch.BAD_SETTINGS, error
    except CheckpointError as error:
        kind, code, cause = "checkpoint", launch.LOST, error
    except NonFiniteError as error:
        kind, code, cause = "non-finite", launch.NON_FINITE, error
    except DivergedError as error:
        kind, code, cause = "diverged", launch.LOST, error
    except BrokenPipeError:
        os._exit(launch.NO_READER)
    except Exception as error:  # noqa: BLE001 - the last stop of a worker: whatever it is, say which rank, where and why
        kind, code, cause = watch.kind_of(error), launch.LOST, error
    if not watch.failed(run, kind, cause):
        _say_early(kind, cause, rank)
    elif "MEGAKERN_PARENT" not in os.environ:  # else the launcher reports
        watch.report_once(run, int(world["WORLD_SIZE"]) if world else 1)
    # Not by way of destroy_process_group: it can wait for ranks that wait for us.
    sys.stdout.flush()
    os._exit(code)


def _say_early(kind: str, error: BaseException, rank: int) -> None:
    """Before the ranks have records. Wrong settings are found by all ranks alike, so rank 0 speaks for them."""
    if kind == "settings":
        text = f"megakern: {error}\n" if rank == 0 else ""
    else:
        trace = "".join(traceback.format_exception(error))
        text = f"megakern: rank {rank} failed before all ranks had joined:\n{trace}"
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
