"""Where this process stands in the mesh of processes. Passed in, never looked up globally."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megakern.parallel import trace
from megakern.parallel.overlap import why_not_fused
from megakern.parallel.region import TensorRegion

DIMS = ("pp", "dp", "cp", "tp")  # slowest to fastest: the ranks of one tp group are neighbours


@dataclass(frozen=True)
class ParallelContext:
    """A `DeviceMesh` with dims (pp, dp, cp, tp), or no mesh at all for a single process.

    With replicas > 1, the mesh's dims are (pp, replica, shard, cp, tp), and dp is replica x shard.

    At size 1 each collective is the identity, and parameters are plain tensors. Make one with `create` after
    `torch.distributed.init_process_group`; `ParallelContext()` is the single process.
    """

    mesh: DeviceMesh | None = None
    sequence_parallel: bool = False
    """Under tp > 1, shard the residual stream over time between the tensor-parallel regions (arXiv 2205.05198) while
    gradients are recorded. T must be divisible by tp then; without gradients nothing is kept, so nothing is sharded."""
    overlap_rows: int | None = None
    """From this many rows a rank on, sequence-parallel collectives are cut into pieces that overlap with the products
    (overlap.py). None: 512 on GPUs, never on CPUs. 0: never."""
    fused_collectives: bool = False
    """Use torch's fused symmetric-memory operators for sequence-parallel collectives and products, at any size."""
    flat_dp: DeviceMesh | None = None
    """dp as one dim, where the mesh has it as two."""

    def __post_init__(self) -> None:
        if self.overlap_rows is not None and self.overlap_rows < 0:
            raise ValueError(f"overlap_rows must be 0 (never) or more, got {self.overlap_rows}")
        if self.fused_collectives and self.tp_size > 1:
            reason = why_not_fused(self.mesh.device_type, self.tp_size)
            if reason is not None:
                raise ValueError(f"fused_collectives was asked for, but {reason}")

    @classmethod
    def create(
        cls,
        *,
        tp: int = 1,
        dp: int | None = None,
        cp: int = 1,
        pp: int = 1,
        replicas: int = 1,
        device_type: str = "cpu",
        **choices,
    ) -> ParallelContext:
        """A context over the whole world; `dp=None` takes what the other dims leave. `choices` are fields of the class.

        replicas: how many copies of the training state the dp ranks hold together; each is sharded over the other
        dp / replicas. Raises ValueError when the sizes do not multiply to the world size, and for fused_collectives
        that cannot run, with the reason.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        rest = tp * cp * pp
        if min(tp, cp, pp) < 1 or (dp is not None and dp < 1):
            raise ValueError(f"parallel sizes must be 1 or more, got pp={pp} dp={dp} cp={cp} tp={tp}")
        if pp > 1 or cp > 1:
            raise ValueError(f"pipeline and context parallel are not in this version: pp and cp are 1, got {pp}, {cp}")
        if world % rest or (dp is not None and rest * dp != world):
            raise ValueError(
                f"pp={pp} x dp={dp or 'rest'} x cp={cp} x tp={tp} does not give the {world} processes "
                f"that were started; start {rest * (dp or 1)}, or change a size"
            )
        dp = world // rest
        if replicas < 1 or dp % replicas:
            raise ValueError(f"replicas = {replicas} does not divide dp = {dp}; choose one that does")
        if world == 1:
            return cls(**choices)
        if replicas == 1:
            mesh, flat = init_device_mesh(device_type, (pp, dp, cp, tp), mesh_dim_names=DIMS), None
        else:
            names = ("pp", "replica", "shard", "cp", "tp")
            mesh = init_device_mesh(device_type, (pp, replicas, dp // replicas, cp, tp), mesh_dim_names=names)
            flat = mesh["replica", "shard"]._flatten("dp")
            _bound_by_default_timeout(flat)
        _bound_by_default_timeout(mesh)
        return cls(mesh, flat_dp=flat, **choices)

    def _along(self, dim: str) -> DeviceMesh:
        return self.flat_dp if dim == "dp" and self.flat_dp is not None else self.mesh[dim]

    def size(self, dim: str) -> int:
        return 1 if self.mesh is None else self._along(dim).size()

    def rank(self, dim: str) -> int:
        return 0 if self.mesh is None else self._along(dim).get_local_rank()

    def group(self, dim: str) -> dist.ProcessGroup | None:
        """The process group of `dim`, or None when it has one member (a collective over it is the identity)."""
        return None if self.size(dim) == 1 else self._along(dim).get_group()

    @property
    def data_mesh(self) -> DeviceMesh:
        """What FSDP2 shards over: dp, or (replica, shard), replicated along the first."""
        return self.mesh["dp"] if self.flat_dp is None else self.mesh["replica", "shard"]

    @property
    def tp_size(self) -> int:
        return self.size("tp")

    @property
    def tp_rank(self) -> int:
        return self.rank("tp")

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        return self.group("tp")

    @property
    def tensor_region(self) -> TensorRegion:
        """What a tensor-parallel layer needs to know of this context: looked up once, at construction."""
        split = self.sequence_parallel and self.tp_size > 1
        return TensorRegion(self.tp_group, split, self.overlap_rows, self.fused_collectives)

    @property
    def world_rank(self) -> int:
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def world_size(self) -> int:
        return 1 if self.mesh is None else dist.get_world_size()

    def shard(self, size: int, what: str, dim: str = "tp") -> int:
        """`size / R`. Raises ValueError when R does not divide it."""
        ranks = self.size(dim)
        if size % ranks:
            raise ValueError(f"{what} = {size} cannot be split over {dim} = {ranks}; choose a {dim} that divides it")
        return size // ranks

    def barrier(self) -> None:
        if self.mesh is not None:
            trace.collective("barrier", None, None)
            dist.barrier()

    def device(self) -> torch.device:
        """The device this process computes on: its local accelerator on a GPU mesh, else the CPU."""
        if self.mesh is None or self.mesh.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.mesh.device_type, torch.get_device_module(self.mesh.device_type).current_device())


def _bound_by_default_timeout(mesh: DeviceMesh) -> None:
    """Groups of a mesh start with torch's own timeout (30 minutes for gloo), whatever the default group was given."""
    options = dist.group.WORLD._get_backend(torch.device(mesh.device_type)).options
    if options is None:
        return  # the backend of simulated worlds: nothing waits there
    for group in mesh.get_all_groups():
        _set_pg_timeout(options._timeout, group)
