"""`megakern plan`: the memory of one rank under a layout that this machine does not have, from a simulated step.

The real model, sharding and optimizer run one training step on tensors without data (FakeTensor) in a world whose
collectives do nothing. Every allocation is counted; those inside an op's kernel (workspaces) are not.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megakern.config import require
from megakern.layers.dropout import DropoutKey
from megakern.model.gpt import GPT, parameter_count
from megakern.model.memory import activation_bytes
from megakern.ops.grad_norm import gradient_norm
from megakern.parallel.blocks import local_of
from megakern.parallel.collectives import finish_gradients
from megakern.parallel.context import ParallelContext
from megakern.parallel.data import begin_pass
from megakern.train.build import fill_model, make_model, make_optimizer, start_masters
from megakern.train.config import RunConfig
from megakern.train.machine import DTYPES

_RECOUNT = 256
"""What lives is counted anew when more than a part in this many of the peak was allocated since."""


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of the storages that live fake tensors hold. Enter it inside a FakeTensorMode."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._grown = 0
        self._paused = False
        self._storages: dict[int, weakref.ref] = {}

    def live(self) -> int:
        """Bytes now. Storages are asked anew: data parallelism frees and refills its gathered weights in place."""
        storages = [reference() for reference in list(self._storages.values())]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a DTensor has no memory of its own: its local tensor's op comes here next
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._note(tensor.untyped_storage())
        if self._grown * _RECOUNT > self.peak:
            self.peak, self._grown = max(self.peak, self.live()), 0
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key, None))
            self._grown += storage.nbytes()

    def __enter__(self) -> AllocationCounter:
        # DTensor finds the shape of a result by running the op on whole tensors. Without a simulation it has a fake
        # mode of its own for that; here it would take ours, and they would be counted.
        self._shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def uncounted(*arguments, **keywords):
            before, self._paused = self._paused, True
            try:
                return self._shapes(*arguments, **keywords)
            finally:
                self._paused = before

        ShardingPropagator._propagate_tensor_meta_non_cached = uncounted
        return super().__enter__()

    def __exit__(self, *error) -> None:
        ShardingPropagator._propagate_tensor_meta_non_cached = self._shapes
        super().__exit__(*error)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What rank 0 holds, in bytes, of the run that `config` describes on tp x dp ranks; no rank holds more."""

    config: RunConfig
    parameters: int
    """Number of parameters of the whole model."""
    weights: int
    start_peak: int
    """Largest sum while the weights are made and filled."""
    gathered: int
    """Weights of other dp ranks that are there at the end of the forward pass (`parallel.zero`)."""
    activations: int
    """Kept by the forward pass of one micro-batch for its backward pass, by formula."""
    gradients: int
    optimizer: int
    peak: int
    """Largest sum in a whole training step."""
    written: int
    """Bytes of tensors in the files of a checkpoint that this rank writes."""

    def describe(self) -> str:
        model, parallel, train = self.config.model, self.config.parallel, self.config.train
        more = ", sequence parallel" if parallel.sequence_parallel else ""
        rows, ranks = train.rows(parallel.dp), parallel.tp * parallel.dp
        count = f"{self.parameters / 1e9:.3f} B" if self.parameters >= 1e9 else f"{self.parameters / 1e6:.3f} M"
        sizes = [
            ("weights", self.weights, "this rank's shard, between steps"),
            ("gathered weights", self.gathered, f"of the other dp ranks, after forward (zero {parallel.zero})"),
            ("activations", self.activations, f"of a micro-batch, recompute {train.recompute}"),
            ("gradients", self.gradients, "between backward and update"),
            ("optimizer states", self.optimizer, ""),
            ("peak of a step", self.peak, "all of a training step, workspaces of kernels aside"),
            ("peak at start", self.start_peak, "while the weights are made and filled"),
            ("checkpoint", self.written, "that this rank writes"),
        ]
        lines = [
            f"{count} parameters on {ranks} {'process' if ranks == 1 else 'processes'}: tp {parallel.tp} x "
            f"dp {parallel.dp}{more}",
            f"a step: {train.batch} sequences of {model.sequence_length} tokens, {rows} in one pass of a dp rank, "
            f"{train.precision}",
            "one rank:",
            *(f"  {name:<17}{_readable(size):>10}   {note}".rstrip() for name, size, note in sizes),
        ]
        return "\n".join(lines)


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@contextmanager
def _world(ranks: int) -> Iterator[None]:
    """This process as rank 0 of `ranks`; collectives return at once and move nothing."""
    require(not dist.is_initialized(), "a plan needs a process of its own: torch.distributed is in use here")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def plan(config: RunConfig) -> Plan:
    """Simulate one training step of rank 0. precision "auto" is taken as bf16.

    Raises ConfigError when the layout does not fit the model or the batch.
    """
    parallel = config.parallel.over(config.parallel.tp * (config.parallel.dp or 1))
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    train = dataclasses.replace(config.train, precision=precision)
    config = dataclasses.replace(config, parallel=parallel, train=train)
    config.model.check_tensor_parallel(parallel.tp)
    train.rows(parallel.dp)
    parameters = parameter_count(config.model)
    with _world(parallel.tp * parallel.dp):
        context = ParallelContext.create(
            tp=parallel.tp,
            dp=parallel.dp,
            replicas=parallel.replicas,
            sequence_parallel=parallel.sequence_parallel,
        )
        model = make_model(config, context, "meta")
        with FakeTensorMode(allow_non_fake_inputs=True), AllocationCounter() as counter:
            return _step(config, parameters, model, counter)


def _step(config: RunConfig, parameters: int, model: GPT, counter: AllocationCounter) -> Plan:
    parallel, train = config.parallel, config.train
    rows, length = train.rows(parallel.dp), config.model.sequence_length
    passes = train.batch // (rows * parallel.dp)
    formula = activation_bytes(
        config.model,
        rows,
        tp=parallel.tp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        recompute=train.recompute,
        recompute_modules=train.recompute_modules,
        element=DTYPES[train.precision].itemsize,
    )
    fill_model(model, config, "cpu")
    start_peak = counter.peak
    optimizer = make_optimizer(model, config)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        optimizer.state[parameter]["step"] = 0  # a number here: the optimizer reads it back, a fake tensor has none
    start_masters(model, optimizer, config)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    gathered = 0
    for index in range(min(passes, 2)):  # a third micro-batch finds what the second found
        begin_pass(model, zero=parallel.zero, last=index == min(passes, 2) - 1)
        before = counter.live()
        loss = model(tokens, tokens, dropout_key=DropoutKey(seed=train.seed, step=0))
        gathered = max(gathered, counter.live() - before - formula.kept)
        loss.backward()
        del loss
    finish_gradients(model.parameters())
    gradients = sum(_bytes(parameter.grad) for parameter in learning)
    gradient_norm(model.parameters())
    optimizer.step()
    states = sum(
        _bytes(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return Plan(
        config=config,
        parameters=parameters,
        weights=sum(_bytes(parameter) for parameter in model.parameters()),
        start_peak=start_peak,
        gathered=max(0, gathered),
        activations=formula.kept,
        gradients=gradients,
        optimizer=states,
        peak=counter.peak,
        written=sum(_bytes(parameter) for parameter in learning) + states,
    )


def _bytes(tensor: torch.Tensor) -> int:
    local = local_of(tensor)
    return local.numel() * local.element_size()
