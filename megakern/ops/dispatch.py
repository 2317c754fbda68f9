"""Which backend computes an op: the table of ops, the choice, its explanation, and the registration of custom ops.

Choice: explicit `backend=` > `with use_backend(...)` > automatic (first supported one in `PREFERENCE`). Backends live
in `megakern/kernels/<backend>/`; each offers

    unavailable() -> None | str          why this machine cannot use it at all
    supports(problem) -> None | str      why it cannot compute this problem
    configuration(problem) -> str        optional: what it runs this problem with, for `explain`
    OPS: names of public ops             optional: those it has kernels for; without it, all
    TRACEABLE: bool                      optional: under torch.compile its launchers go into the graph, not the op
    LAUNCHERS: str                       optional: the backend whose launchers it uses

and, in a module with the op's stem, launchers that share one signature over all backends.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from megakern.ops import autocast

log = logging.getLogger("megakern")

BACKENDS = ("cuda", "triton", "torch", "simt")

# Fastest first, by device type. `simt` runs CUDA sources on a CPU for tests and is never chosen automatically.
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("torch",)}
DEFAULT_PREFERENCE = ("torch",)

LIBRARY = library.Library("megakern", "DEF")
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_AUTOCAST = ("AutocastCPU", "AutocastCUDA")


@dataclass(frozen=True)
class Problem:
    """What a backend needs to know to accept or refuse: device type, dtype, named sizes and options of one call."""

    op: str
    device: str
    dtype: torch.dtype
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """The outcome of a choice: the backend that runs (None: no backend can), and a line about each one."""

    problem: Problem
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.problem.sizes.items())
        head = (
            f"{self.problem.op} on {self.problem.device}, {self.problem.dtype}, {sizes}: {self.chosen or 'no backend'}"
        )
        return "\n".join([head, *(f"  {backend:<7}{reason}" for backend, reason in self.reasons.items())])


# Public name -> function of the public arguments that states the problem. An op adds itself when its module is loaded,
# which `import megakern` leaves to the first use: `_known` looks at all of them.
OPS: dict[str, Callable[..., Problem]] = {}

_overrides: tuple[tuple[str | None, str], ...] = ()  # a plain tuple: dynamo cannot trace a ContextVar
_logged: set[tuple[str, str]] = set()


def describes(name: str) -> Callable[[Callable[..., Problem]], Callable[..., Problem]]:
    """Decorator: this function turns the arguments of the public op `name` into a `Problem`."""

    def add(problem: Callable[..., Problem]) -> Callable[..., Problem]:
        OPS[name] = problem
        return problem

    return add


def _load(backend: str):
    if importlib.util.find_spec(f"megakern.kernels.{backend}") is None:
        return None
    return importlib.import_module(f"megakern.kernels.{backend}")


# Filled once, when the first op is imported: dynamo cannot trace an import or a cached function.
_MODULES = {backend: _load(backend) for backend in BACKENDS}
UNAVAILABLE: dict[str, str | None] = {
    backend: "not part of this version of megakern" if module is None else module.unavailable()
    for backend, module in _MODULES.items()
}


def refusal(backend: str, problem: Problem) -> str | None:
    """Why `backend` cannot compute `problem`, or None."""
    if backend not in UNAVAILABLE:
        raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    return UNAVAILABLE[backend] or _MODULES[backend].supports(problem)


def _known(op: str) -> bool:
    """Is this the name of an op? Loads all ops before it says no."""
    if op not in OPS:
        _load_all_ops()
    return op in OPS


@functools.cache
def _load_all_ops() -> None:
    for module in pkgutil.iter_modules([os.path.dirname(__file__)]):
        importlib.import_module(f"megakern.ops.{module.name}")


def ops_of(backend: str) -> list[str]:
    """The public ops that `backend` has kernels for, on this machine or another. Raises ValueError: unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    _load_all_ops()
    return sorted(set(OPS) & set(getattr(_MODULES[backend], "OPS", OPS))) if _MODULES[backend] else []


@functools.cache
def launcher(backend: str, stem: str, name: str) -> Callable:
    """The function `name` of `megakern/kernels/<backend>/<stem>.py`. Called inside custom ops, so never traced."""
    package = getattr(_MODULES[backend], "LAUNCHERS", backend)
    return getattr(importlib.import_module(f"megakern.kernels.{package}.{stem}"), name)


def resolve(problem: Problem, backend: str | None = None) -> str:
    """The name of the backend that computes `problem`.

    Raises ValueError with the reason when a backend was asked for and cannot, or when none can.
    """
    asked = backend or _overridden(problem.op)
    if asked is not None:
        reason = refusal(asked, problem)
        if reason is not None:
            raise ValueError(f"{problem.op}: backend {asked!r} was asked for, but {reason}")
        return asked
    first = None
    for candidate in PREFERENCE.get(problem.device, DEFAULT_PREFERENCE):
        reason = refusal(candidate, problem)
        if reason is None:
            if first is not None and not torch.compiler.is_compiling():
                _log_fallback(problem.op, candidate, *first)
            return candidate
        first = first or (candidate, reason)
    raise ValueError(f"{problem.op}: no backend can compute this; first choice {first[0]!r}: {first[1]}")


def _overridden(op: str) -> str | None:
    for name, backend in reversed(_overrides):
        if name is None or name == op:
            return backend
    return None


def is_overridden() -> bool:
    """Is the automatic choice of any op overruled?"""
    return bool(_overrides)


def _log_fallback(op: str, used: str, preferred: str, reason: str) -> None:
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        log.info("%s runs on %r; %r is preferred, but %s", op, used, preferred, reason)


@contextmanager
def use_backend(backend: str, op: str | None = None) -> Iterator[None]:
    """Within the block, every op (or the one named) runs on `backend`. Process-wide, not per thread.

    Raises ValueError for an unknown backend or op, and at the op's call if the backend cannot compute it.
    """
    global _overrides
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    if op is not None and not _known(op):
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(sorted(OPS))}")
    before = _overrides
    _overrides = (*before, (op, backend))
    try:
        yield
    finally:
        _overrides = before


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """Which backend would run this call, and why each other one would not. Takes the op's own arguments.

    print(mk.explain("rms_norm", x, weight))
    print(mk.explain(mk.attention, q, k, v, causal=True))
    """
    name = op if isinstance(op, str) else op.__name__
    if not _known(name):
        raise ValueError(f"unknown op {name!r}; the ops are {', '.join(sorted(OPS))}")
    asked = kwargs.pop("backend", None) or _overridden(name)
    problem = OPS[name](*args, **kwargs)
    problem = replace(problem, dtype=autocast.computed_in(name, problem.device, problem.dtype))
    refusals = {backend: refusal(backend, problem) for backend in BACKENDS}
    order = (asked,) if asked else PREFERENCE.get(problem.device, DEFAULT_PREFERENCE)
    chosen = next((backend for backend in order if refusals[backend] is None), None)
    reasons = {}
    for backend, reason in refusals.items():
        if backend == chosen:
            reasons[backend] = "runs: asked for" if asked else "runs: first supported in order of speed"
            if hasattr(_MODULES[backend], "configuration"):
                reasons[backend] += f"; {_MODULES[backend].configuration(problem)}"
        elif reason is not None:
            reasons[backend] = f"no: {reason}"
        else:
            reasons[backend] = "could run; only when asked for" if backend not in order else "could run; slower"
    return Explanation(problem, chosen, reasons)


def register(
    name: str,
    schema: str,
    *,
    forward: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    opaque: Callable[..., bool] = lambda *arguments: False,
) -> Callable:
    """Define `megakern::name` with `schema`, for eager, fake tensors and autograd, and return the callable op.

    The last argument of every op is its backend. Calls for which `opaque(*arguments)` holds stay one node of a compiled
    graph; others are replaced by what a traceable backend launches, so that inductor sees it (as torch's triton_op).
    `Library` directly and not torch's `custom_op`, whose calls cost more.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    library.register_fake(f"megakern::{name}", fake, lib=LIBRARY)
    rule = functools.partial(_decompose, forward, opaque)
    library.register_torch_dispatch(f"megakern::{name}", FunctionalTensorMode, rule, lib=LIBRARY)
    op = getattr(torch.ops.megakern, name).default
    for key in _AUTOCAST:
        LIBRARY.impl(name, functools.partial(_as_given, op, getattr(torch._C.DispatchKey, key)), key)
    if backward is not None:
        LIBRARY.impl(name, _differentiable(name, op, forward, setup_context, backward), "Autograd", with_keyset=True)
    return op


def _as_given(op: Callable, key, *arguments):
    """The op's kernel for an Autocast key: the op with autocast off, whose public function has cast what is to be cast.
    A backend's own matrix products would be cast as well, those that it makes in fp32 on purpose too."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return op(*arguments)


def _whole(result):
    """The outputs of an op, none of them a view, in the same memory: autograd lets nobody change a view in place that a
    Function made, and a launcher that reshapes what it has allocated returns one."""
    if isinstance(result, torch.Tensor):
        return result.detach() if result._is_view() else result
    return type(result)(_whole(each) for each in result)


def _differentiable(name: str, op: Callable, kernel: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """The op's kernel for the Autograd key: what torch's `register_autograd` makes, without its search for
    default values in the schema, a quarter of a small call (norm, one CPU core: 59 us against 43, of them 16 in the
    launcher). Schemas here have no default values. Where nothing but a device is left to ask (no mode, no subclass, no
    transform), `kernel` is called without the dispatcher, which would call it: 10.8 us against 14.5 for a norm on the
    `simt` backend, its kernel left out.
    """
    below, known = torch._C._after_autograd_keyset, {}

    def compute(keyset, arguments):
        with torch._C._AutoDispatchBelowAutograd():
            direct = known.get(keys := keyset.raw_repr())
            if direct is None:
                direct = known[keys] = (keyset & below).highestPriorityTypeId() in _DEVICES
            return kernel(*arguments) if direct else op.redispatch(keyset & below, *arguments)

    def forward(ctx, *arguments_and_keyset):
        *arguments, keyset = arguments_and_keyset
        result = _whole(compute(keyset, arguments))
        setup_context(ctx, arguments, result)
        return result

    def gradients(ctx, *upstream):
        if torch.is_grad_enabled():  # under create_graph=True alone; kernels record nothing: wrong in silence
            raise RuntimeError(
                f"{name}: there is no second derivative (create_graph=True); use PyTorch's own operator where one is "
                f"needed"
            )
        found = backward(ctx, *upstream)
        return (*found, None) if isinstance(found, tuple) else (found, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function = type(f"Backward_{name}", (torch.autograd.Function,), methods)

    def differentiable(keyset, *arguments):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments, keyset)
        return compute(keyset, arguments)

    return differentiable


def _decompose(forward, opaque, mode, op, types, arguments, keywords):
    """What the compiler's functionalization does with an op: trace into its launchers, or leave it as it is."""
    backend = arguments[-1]
    plain = all(issubclass(t, (torch.Tensor, FunctionalTensor, FakeTensor)) for t in types)
    if not plain or not getattr(_MODULES[backend], "TRACEABLE", False) or opaque(*arguments):
        return mode.__torch_dispatch__(op, types, arguments, keywords)
    with mode:
        return forward(*arguments)
