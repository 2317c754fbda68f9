"""Data parallelism: FSDP2 (`fully_shard`) over the dp dim, composed with tensor-parallel DTensors.

Each dp rank runs its own samples; gradients are averaged over dp, in fp32. With dp = shards x replicas, p elements of
parameters on one tp rank, and m micro-batches a step, a rank holds and moves:

    zero   parameters between passes    gradients between micro-batches   all-gathers   reduce-scatters
    1      p, gathered once a step      p                                 p             p, at the last micro-batch
    2      p, gathered once a step      p / shards                        p             m p
    3      p / shards                   p / shards                        2 m p         m p

Optimizer states are p / shards under all three, and between steps so are the parameters (arXiv 1910.02054). With
replicas > 1 the last reduce-scatter is followed by an all-reduce of p / shards over the replicas (HSDP,
arXiv 2304.11277); with replicas = dp nothing is sharded: plain replication.

Weights travel in their own dtype. Gathering fp32 weights as bf16 would round norms and biases, which layers use in
fp32, and a run under dp would no longer be the run of one process; bf16 parameters with fp32 masters travel as bf16.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megakern.parallel.context import ParallelContext

ZERO = (1, 2, 3)


def shard_data_parallel(model: nn.Module, parallel: ParallelContext, blocks: Iterable[nn.Module], *, zero: int) -> None:
    """Shard `model` over dp in place; with dp = 1 it stays as it is.

    blocks: submodules that are gathered one at a time; what is outside of them is gathered as one. Parameters may be on
    the meta device: allocated and filled afterwards, no rank ever holds more than its shard. Call `begin_pass` before
    each forward pass of a training step. Raises ValueError when zero is not 1, 2 or 3.
    """
    if zero not in ZERO:
        raise ValueError(f"zero must be 1, 2 or 3, got {zero}")
    if parallel.size("dp") == 1:
        return
    how = {
        "mesh": parallel.data_mesh,
        "reshard_after_forward": zero == 3,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    # torch 2.13 warns that writing over a block's output would drop its hook; blocks and heads here write over none.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)


def keep_gradients_wide(module: FSDPModule) -> None:
    """Leave the reduced gradients of this module's bf16 and fp16 shards in fp32; their `grad_dtype` must allow it.

    FSDP2 rounds them to the parameters' dtype after each reduction, under zero 2 and 3 once a micro-batch. It has no
    public switch for that: the dtype is an attribute that it sets as it starts, in torch 2.11 to 2.13.
    """
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None:  # no parameters of its own
        return
    start = group._init_mp_dtypes

    def start_wide() -> None:
        start()
        if group._orig_dtype in (torch.bfloat16, torch.float16):
            group._orig_dtype = torch.float32

    group._init_mp_dtypes = start_wide
    start_wide()


def begin_pass(model: nn.Module, *, zero: int, last: bool) -> None:
    """Before the forward pass of a micro-batch. last: its backward pass ends the step."""
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(last)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or zero == 3)
    if zero == 1:
        model.set_requires_gradient_sync(last)


def release(model: nn.Module) -> None:
    """After passes without a backward pass: drop the gathered weights, so that the parameters are the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
