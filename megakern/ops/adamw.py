"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101).

    g = grad_scale grad                                         grad_scale: clipping, or 1 / loss scale
    p = p - lr weight_decay p
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Parameters are fp32, fp64, bf16 or fp16, plain or DTensor; each rank updates its own shard, nothing crosses ranks.
Computed in fp32 (fp64 for fp64). The moments are stored in `state_dtype`; with bf16 moments the math stays fp32 and
each new moment is rounded to nearest, so that a relative change below 2^-9 in one step is lost: with beta2 of 0.999, v
can grow but not shrink, so keep beta2 at 0.99 or less there.

bf16 and fp16 parameters have an exact fp32 master and are its rounding after each step. The state holds all of it
("fp32", 4 bytes) or, for bf16, only the 16 bits that the parameter lacks ("split", 2 bytes). With m the bits of the
master, modulo 2^32:

    param = (m + 2^15) >> 16        low = m - 2^16 param, in [-2^15, 2^15)        m = 2^16 param + low

A bijection between fp32 patterns and pairs, so that signs, subnormals and infinities need no case of their own. It
rounds to nearest, ties away from zero. PyTorch's cast takes ties to even, which no 16 bits can undo: 2^16 + 1 masters
round to an even param. The two differ where the low half of m is 2^15, one value in 2^16. Both kinds of master round
this way, so that they train bit for bit alike. The master of a NaN stays one; the param of a NaN whose high payload
bits are all ones or all zeros can be a zero or an infinity (arithmetic makes neither NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megakern.kernels.torch.adamw import join_master, split_master
from megakern.ops import checks
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve

STATE_DTYPES = (torch.float32, torch.bfloat16)
MASTERS = ("fp32", "split")
NARROW = (torch.bfloat16, torch.float16)


def adamw_reference(
    param, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay, grad_scale=1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step, out of place, in the dtype of the inputs -> new param, exp_avg, exp_avg_sq. `step` counts from 1."""
    grad = grad * grad_scale
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad.square()
    corrected = exp_avg / (1 - betas[0] ** step)
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    return param * (1 - lr * weight_decay) - lr * corrected / denominator, exp_avg, exp_avg_sq


@describes("AdamW")
def _problem(
    params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, *, state_dtype=torch.float32, master="fp32"
) -> Problem:
    groups = [entry["params"] if isinstance(entry, dict) else [entry] for entry in params]
    tensors = [tensor for group in groups for tensor in group]
    sizes = {"tensors": len(tensors), "elements": sum(tensor.numel() for tensor in tensors)}
    first = tensors[0] if tensors else torch.empty(0)
    return Problem("AdamW", first.device.type, first.dtype, sizes, {"state_dtype": state_dtype, "master": master})


def _forward(params, grads, exp_avgs, exp_avg_sqs, masters, *options):
    *options, backend = options
    launcher(backend, "adamw", "adamw")(params, grads, exp_avgs, exp_avg_sqs, masters, *options)


# The lists are parallel; masters is empty where params are wide, fp32, or int16: the low halves of bf16 params. All
# params of a call have one dtype, device and step.
_adamw = register(
    "adamw",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] masters, Tensor? grad_scale, bool zero_grads, int step, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, str backend) -> ()",
    forward=_forward,
    fake=lambda *arguments: None,
    opaque=lambda *arguments: True,  # some backends need the tensors' addresses
)


class AdamW(torch.optim.Optimizer):
    """AdamW in one pass over memory, with parameter groups as in torch.optim.

    params: tensors, named tensors or group dicts; lr, betas, eps and weight_decay can be set per group and changed
    between steps (schedulers set `group["lr"]`). `state_dtype`: torch.float32 or torch.bfloat16, what the moments are
    stored in (fp64 parameters have fp64 moments unless bf16 is asked for). `master`: "fp32" or "split", how bf16
    parameters keep their fp32 masters; the updates are the same bit for bit. fp16 parameters need "fp32". The gradients
    may be of another dtype than the parameter, such as fp32 for bf16.

    State per parameter: "step" (0-d fp32 tensor on the CPU), "exp_avg", "exp_avg_sq" and, for bf16 and fp16 parameters,
    "master" (fp32), or "low" (int16) when split; all but "step" have the parameter's shape and placement.
    torch.optim.AdamW's state_dict loads too, and each kind of master loads into the other, after the parameters.
    Raises ValueError or TypeError on options out of range, and at `step` on gradients it cannot use.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        state_dtype: torch.dtype = torch.float32,
        master: str = "fp32",
        backend: str | None = None,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"AdamW: state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}")
        if master not in MASTERS:
            raise ValueError(f"AdamW: master must be one of {', '.join(MASTERS)}, got {master!r}")
        self.state_dtype = state_dtype
        self.master = master
        self.backend = backend
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it lacks are the optimizer's. Raises ValueError or TypeError as the constructor does."""
        group = {**self.defaults, **param_group}
        betas = group["betas"]
        if not 0 <= group["lr"] < float("inf"):
            raise ValueError(f"AdamW: lr must be 0 or more and finite, got {group['lr']}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: betas must be two numbers in [0, 1), got {betas}")
        if not group["eps"] >= 0:
            raise ValueError(f"AdamW: eps must be 0 or more, got {group['eps']}")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"AdamW: weight_decay must be 0 or more, got {group['weight_decay']}")
        if group.get("amsgrad"):
            raise ValueError("AdamW: amsgrad is not offered; use torch.optim.AdamW(amsgrad=True)")
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in checks.FLOATS:
                raise TypeError(f"AdamW: parameters must be float16, bfloat16, float32 or float64, got {param.dtype}")
            if param.dtype == torch.float16 and self.master == "split":
                raise TypeError('AdamW: float16 is not the upper half of float32; use master="fp32" for it')

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: torch.Tensor | None = None,
        zero_grads: bool = False,
    ) -> Any:
        """One update of every parameter that has a gradient -> what `closure` returned, if given.

        grad_scale: a tensor of one element that multiplies all gradients inside the update; the gradients themselves
        are left as they are. zero_grads: leave zeros in them, in the same pass over memory, for loops that keep their
        gradient buffers; where `zero_grad()` frees them, that is cheaper.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if grad_scale is not None and (not isinstance(grad_scale, torch.Tensor) or grad_scale.numel() != 1):
            raise TypeError(f"AdamW: grad_scale must be a tensor of one element, got {grad_scale!r}")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            options = (float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
            for (_, _, step), rows in self._batches(group).items():
                params, grads, exp_avgs, exp_avg_sqs, masters = (list(column) for column in zip(*rows, strict=True))
                masters = [] if masters[0] is None else masters
                problem = _problem(params, state_dtype=self.state_dtype, master=self.master)
                backend = resolve(problem, self.backend)
                lists = (params, grads, exp_avgs, exp_avg_sqs, masters)
                _adamw(*lists, grad_scale, zero_grads, step, *options, backend)
        return loss

    def start_state(self, updates: int) -> None:
        """Allocate every state now, as after `updates` steps with zero moments, for a checkpoint to be read into."""
        for group in self.param_groups:
            for param in group["params"]:
                self._complete(param, self.state[param])
                self.state[param]["step"].fill_(updates)

    @torch.no_grad()
    def set_master(self, param: torch.Tensor, value: torch.Tensor) -> None:
        """Start a bf16 or fp16 `param` from fp32 `value`: the state keeps it exactly, `param` becomes its rounding.

        value: of the param's shape; for a DTensor, this rank's shard. Raises ValueError or TypeError otherwise.
        """
        shard = _local(param)
        if param.dtype not in NARROW or value.dtype != torch.float32:
            raise TypeError(f"AdamW: set_master takes fp32 for a bf16 or fp16 param, got {value.dtype}, {param.dtype}")
        if value.shape != shard.shape:
            raise ValueError(f"AdamW: a master must have the shape of its param, {shard.shape}, got {value.shape}")
        state = self.state[param]
        self._complete(param, state)
        if self.master == "split":
            narrow, low = split_master(value)
            _local(state["low"]).copy_(low)
        else:
            narrow = split_master(value)[0] if param.dtype == torch.bfloat16 else value
            _local(state["master"]).copy_(value)
        shard.copy_(narrow)

    def _batches(self, group: dict[str, Any]) -> dict[tuple, list[tuple]]:
        """Local tensors (param, grad, exp_avg, exp_avg_sq, master or low) by (dtype, device, number of the step)."""
        batches: dict[tuple, list[tuple]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            grad, state = _matching_gradient(param), self.state[param]
            self._complete(param, state)
            state["step"] += 1
            row = (param, grad, state["exp_avg"], state["exp_avg_sq"], state.get("master", state.get("low")))
            key = (param.dtype, param.device, int(state["step"]))
            batches.setdefault(key, []).append(tuple(_local(tensor) for tensor in row))
        return batches

    def _moment_dtype(self, param: torch.Tensor) -> torch.dtype:
        wide = param.dtype == torch.float64 and self.state_dtype == torch.float32
        return torch.float64 if wide else self.state_dtype

    def _complete(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Make what the state of `param` lacks: all of it at first, the master after loading torch.optim's state."""
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(
                    param, dtype=self._moment_dtype(param), memory_format=torch.contiguous_format
                )
        if param.dtype not in NARROW:
            return
        if self.master == "split" and "low" not in state:
            state["low"] = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.contiguous_format)
        elif self.master == "fp32" and "master" not in state:
            state["master"] = param.detach().float().contiguous()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim, but states keep their own dtypes: torch.optim would round them to the parameter's."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name in ("exp_avg", "exp_avg_sq"):
                    self.state[param][name] = value.to(
                        device=param.device, dtype=self._moment_dtype(param)
                    ).contiguous()
                elif name in ("master", "low"):
                    self._load_master(param, name, value.to(param.device).contiguous())
                elif name == "step":
                    self.state[param][name] = torch.as_tensor(value, dtype=torch.float32).cpu().clone()

    def _load_master(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """`value` is the saved state `name`, "master" or "low"; kept as this optimizer keeps it."""
        state, kept = self.state[param], "low" if self.master == "split" else "master"
        state.pop(name)
        if param.dtype not in NARROW:
            return
        if name == kept:
            state[kept] = value
            return
        self._complete(param, state)
        if kept == "master":
            _local(state["master"]).copy_(join_master(_local(param), _local(value)))
            return
        narrow, low = split_master(_local(value))
        if not torch.equal(narrow.view(torch.int16), _local(param).view(torch.int16)):
            raise ValueError(
                "AdamW: a parameter is not the rounding of the fp32 master that is loaded for it; load the model's own "
                'parameters first, or go on with master="fp32"'
            )
        _local(state["low"]).copy_(low)

    def __getstate__(self) -> dict[str, Any]:
        options = {"state_dtype": self.state_dtype, "master": self.master, "backend": self.backend}
        return {**super().__getstate__(), **options}


def _local(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _matching_gradient(param: torch.Tensor) -> torch.Tensor:
    """The gradient of `param`. Raises if it is sparse or sharded differently."""
    grad = param.grad
    if grad.layout != torch.strided:
        raise TypeError(f"AdamW: gradients must be dense, got one of layout {grad.layout}; use torch.optim.SparseAdam")
    if isinstance(param, DTensor) != isinstance(grad, DTensor) or (
        isinstance(param, DTensor) and grad.placements != param.placements
    ):
        raise ValueError(
            f"AdamW: a gradient must be sharded as its parameter, {getattr(param, 'placements', 'not sharded')}, "
            f"got {getattr(grad, 'placements', 'not sharded')}; "
            f"redistribute it first (partial ones: finish_gradients(model.parameters()))"
        )
    return grad
