"""What the server of commands and ranks imports once (tests/commands.py), before it forks the first."""
# ruff: noqa: F401

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.backends.backend_agg
import matplotlib.figure
import pytest
import torch
import torch._dynamo  # by torch's optimizers: 0.7 s in each process that makes its first

import megakern.cli
import megakern.train.supervisor
import megakern.train.worker
import megakern.verify.run
from tests.rates import measure_now, measure_once

torch.set_num_threads(1)
measure_once()
measure_now()
gc.freeze()  # what is here stays as it is in each fork
