"""What the server of commands and ranks imports once (tests/commands.py), before it forks the first."""
# ruff: noqa: F401

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.backends.backend_agg
import torch

import megakern.cli
import megakern.train.supervisor
import megakern.train.worker
import megakern.verify.run

torch.set_num_threads(1)
gc.freeze()  # what is here stays as it is in each fork
