"""One process of a run: `python -m megakern.train.worker RUN`. Started by `megakern train`."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megakern.config import ConfigError

if TYPE_CHECKING:
    from megakern.train.run import NewRun


def work(run: Path, new: NewRun | None = None) -> int:
    """Join the world, train RUN from its newest checkpoint (or from the start), and return the exit code.

    `new`: the run whose folder rank 0 makes first; None when the launcher has made it.
    """
    import torch.distributed as dist

    from megakern.data.files import DataError
    from megakern.train.checkpoint import CheckpointError
    from megakern.train.config import load_config
    from megakern.train.launch import StopRequest, join, joined_world
    from megakern.train.trainer import NonFiniteError, Trainer

    world = joined_world()
    rank = int(world["RANK"]) if world else 0
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="megakern: %(message)s")
    stop = StopRequest()
    stop.listen()
    try:
        with new.locked() if new is not None and rank == 0 else nullcontext():
            if new is not None and rank == 0:
                new.create()
            settings = load_config(run / "config.toml").parallel if new is None else new.config.parallel
            parallel = join(settings)
            parallel.barrier()
            trainer = Trainer(load_config(run / "config.toml"), run, parallel)
            signal_number = trainer.fit(stop)
            parallel.barrier()
            return 128 + signal_number if signal_number else 0
    except (ConfigError, DataError) as error:
        return _fail(error, rank, 2)
    except CheckpointError as error:
        return _fail(error, rank, 1)
    except NonFiniteError as error:
        return _fail(error, rank, 3)
    except Exception:  # noqa: BLE001 - the last stop of a worker: say which rank failed, then end with code 1
        print(f"megakern: rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # Not destroy_process_group: it can wait for ranks that wait for us.
        os._exit(1)
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _fail(error: Exception, rank: int, code: int) -> int:
    if rank == 0:  # these errors are the same on every rank
        print(f"megakern: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
