"""The model and optimizer of a run's settings, split over the ranks of a layout: no rank makes more than its shards."""

from __future__ import annotations

import torch

from megakern.layers.lora import add_adapters
from megakern.layers.parameter import accumulate_in_fp32, initial_values
from megakern.model.gpt import GPT
from megakern.ops.adamw import AdamW
from megakern.parallel.context import ParallelContext
from megakern.parallel.data import shard_data_parallel
from megakern.train.config import LoraConfig, RunConfig
from megakern.train.machine import DTYPES


def make_model(config: RunConfig, parallel: ParallelContext, device: torch.device | str) -> GPT:
    """The model of `config`, sharded over tp and dp; on "meta" shapes only, until `materialize`."""
    model = GPT(
        config.model,
        parallel,
        device="meta",
        dtype=DTYPES[config.parameter_precision],
        compute_dtype=DTYPES[config.train.precision],
        recompute=config.train.recompute,
        recompute_modules=config.train.recompute_modules,
    )
    adapt(model, config.lora)
    shard_data_parallel(model, parallel, model.blocks, zero=config.parallel.zero)
    if torch.device(device).type != "meta":
        fill_model(model, config, device)
    return model


def adapt(model: GPT, lora: LoraConfig) -> None:
    """Adapters as the settings say; with rank 0 the model stays as it is."""
    if lora.rank:
        how = {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets, "dropout": lora.dropout}
        add_adapters(model, model.parallel, **how)


def fill_model(model: GPT, config: RunConfig, device: torch.device | str) -> None:
    """Allocate a model on "meta" and give it its initial weights, and its gradients their dtype."""
    model.materialize(device, seed=config.train.seed)
    dp, train = model.parallel.size("dp"), config.train
    if config.optimizer.master != "none" or train.batch > train.rows(dp) * dp:
        accumulate_in_fp32(model)


def make_optimizer(model: GPT, config: RunConfig) -> AdamW:
    """AdamW with weight decay on matrices and embeddings only, and the token embedding's own learning rate."""
    settings = config.optimizer
    embedding = model.embedding.weight
    learning = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in learning if p is not embedding]
    decay = {"weight_decay": settings.weight_decay}
    groups = [
        {"params": [p for p in learning if p is embedding], "lr_scale": settings.embedding_lr_scale, **decay},
        {"params": [p for p in rest if p.ndim >= 2], "lr_scale": 1.0, **decay},
        {"params": [p for p in rest if p.ndim < 2], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        state_dtype=getattr(torch, settings.state_dtype),
        master="split" if settings.master == "split" else "fp32",
    )


def start_masters(model: GPT, optimizer: AdamW, config: RunConfig) -> None:
    """Start the masters of narrow parameters from the fp32 initial values, not from their rounding."""
    if config.optimizer.master != "none":
        for parameter, values in initial_values(model, config.train.seed):
            if parameter.requires_grad:
                optimizer.set_master(parameter, values)
