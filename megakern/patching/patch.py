"""`mk.patch` and `mk.unpatch`: this project's ops inside a Hugging Face model that is already there.

Modules are swapped one by one, in this model alone: no class, function or module of transformers changes. Parameters,
their names and the order of modules stay, so checkpoints, optimizers and `save_pretrained` do not notice.

What the config of a model says of its attention counts for all its layers, and other models may share the config. So
a patched model has a copy of it, and `unpatch` puts the original back, with all that was set in between but the
attention.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from megakern.ops.dispatch import BACKENDS, UNAVAILABLE
from megakern.patching.families import FAMILIES, PARTS, Entry, entry_of, parent_entry
from megakern.patching.report import Report, Tally

# Older ones give mask functions other arguments. All tests pass with 5.4.0 (those of torch.compile not run), 5.20.2
# and 5.23.0.
OLDEST_TRANSFORMERS = (5, 4)


def patch(
    model: nn.Module,
    *,
    norm: bool = True,
    activation: bool = True,
    rope: bool = True,
    attention: bool = True,
    loss: bool = True,
    backend: str | None = None,
) -> Report:
    """Swap parts of a Hugging Face Llama, Qwen2, Qwen3, Mistral or GPT-2 for this project's ops, in place.

    model: the model, or a module that holds one (PEFT). norm: RMSNorm, LayerNorm; activation: SwiGLU, GELU; rope: the
    rotation of queries and keys; attention: its kernel, with masks of padded, packed and windowed batches; loss: in
    training, with labels, the loss without the logits (`outputs.logits` is then None; in eval mode they are there).
    backend: of all swapped ops, else each chooses, see `use_backend`. Under gradient checkpointing, `generate`,
    `Trainer` and `torch.compile` (called after this) the model works as before.

    Returns what was swapped and what was not, and why. Called again with the same arguments it changes nothing. Raises
    TypeError: not a module; ValueError: no model of these families in it, a compiled model, a model patched with other
    arguments, an unknown or unusable backend; ImportError: no transformers, or one older than 5.4.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module that holds a {FAMILIES}, got {type(model).__name__}")
    parts = tuple(name for name, wanted in zip(PARTS, (norm, activation, rope, attention, loss), strict=True) if wanted)
    _check_arguments(parts, backend)
    _check_transformers()
    _check_not_compiled(model)
    bodies = [module for module in model.modules() if _is(module, "base")]
    if not bodies:
        raise ValueError(f"patch: there is no {FAMILIES} in this {type(model).__name__}; it is left as it was")

    from megakern.patching.swapped import Options

    options = Options(parts, backend)
    for module in model.modules():
        before = getattr(module, "_megakern", options)
        if before == options:
            options = before
        else:
            raise ValueError(
                f"patch: this model is patched already, with {', '.join(before.parts)} and backend={before.backend!r}; "
                f"mk.unpatch(model) first"
            )
    walk = _Walk(options, bodies)
    for body in bodies:
        walk.body(body)
    walk.rest(model)
    if attention and not walk.no_attention:
        _own_config(model, bodies, options)
    return walk.tally.report(type(model).__name__)


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: classes, config and attention implementation are those from before it.

    Raises ValueError when nothing in `model` is patched, or a class was derived from a patched one (FSDP2).
    """
    patched = [m for m in model.modules() if "_megakern" in m.__dict__] if isinstance(model, nn.Module) else []
    if not patched:
        raise ValueError(f"unpatch: nothing in this {type(model).__name__} is patched; mk.patch(model) does that")

    from megakern.patching import classes

    for module in patched:
        if hasattr(type(module), "_unpatched") and not classes.is_swapped(module):
            raise ValueError(
                f"unpatch: {type(module).__name__} was made of a patched class later on, as fully_shard does; nothing "
                f"is undone"
            )
    for module in patched:
        classes.restore(module)
    for module in model.modules():
        if "_megakern_config" in module.__dict__:
            module.config = _merged(module.config, module.__dict__.pop("_megakern_config"))


class _Walk:
    """Through a model: what is swapped, what is not, and why."""

    def __init__(self, options, bodies):
        self.options, self.bodies, self.tally = options, bodies, Tally()
        # All layers must agree on positions and masks, and all bodies of a model may share one config.
        self.no_rope = next(filter(None, map(_disagreement, bodies)), None)
        self.no_attention = self.no_rope or next(filter(None, (_wants_more(body.config) for body in bodies)), None)

    def wants(self, part: str) -> bool:
        return part in self.options.parts

    def swap(self, module: nn.Module, entry: Entry, what: str) -> None:
        from megakern.patching import classes

        if not classes.is_swapped(module):
            classes.swap(module, self.options)
        self.tally.swapped[entry.part, entry.name, what] += 1

    def keep(self, module: nn.Module, part: str, reason: str) -> None:
        self.tally.kept[part, _original(module).__name__, reason] += 1

    # --- a model's body: LlamaModel, GPT2Model and what they hold ---

    def body(self, body: nn.Module) -> None:
        for module in body.modules():
            if module is body:
                continue
            entry = entry_of(_original(module))
            if entry is None:
                self._unknown(module)
            elif entry.part == "norm":
                op = "rms_norm" if entry.mixin == "RMSNorm" else "layer_norm"
                self._one(module, entry, _norm_refusal(module), op)
            elif entry.part == "activation":
                op = "swiglu" if entry.mixin == "GatedMLP" else "gelu"
                self._one(module, entry, _mlp_refusal(module) if op == "swiglu" else None, op)
            elif entry.part == "rope":
                self._one(module, entry, self.no_rope, "rope (cos and sin in fp32)")
            elif entry.part == "attention":
                self._attention(module, entry)

    def _one(self, module, entry, refusal, what) -> None:
        if not self.wants(entry.part):
            self.keep(module, entry.part, f"{entry.part}=False")
        elif reason := _replaced(module) or refusal:
            self.keep(module, entry.part, reason)
        else:
            self.swap(module, entry, what)

    def _attention(self, module, entry) -> None:
        if entry.mixin:
            self._one(module, replace(entry, part="rope"), self.no_rope, "rope")
        reason = self.no_attention if self.wants("attention") else "attention=False"
        if reason:
            self.keep(module, "attention", reason)
        else:
            module._megakern = self.options
            self.tally.swapped["attention", entry.name, "attention"] += 1

    def _unknown(self, module) -> None:
        """Not in the table: a subclass of something in it, or nothing that an op here would make faster."""
        parent = parent_entry(_original(module))
        if parent is not None:
            self.keep(module, parent.part, f"a subclass of {parent.name}, whose forward may differ")
        elif not list(module.children()):
            self.keep(module, "-", "nothing here is faster in its place")

    # --- what holds the bodies: heads, wrappers ---

    def rest(self, model: nn.Module) -> None:
        inside = {id(module) for body in self.bodies for module in body.modules()}
        for module in model.modules():
            if id(module) in inside:
                continue
            entry, parent = entry_of(_original(module)), parent_entry(_original(module))
            if entry is not None and entry.part == "loss":
                self._head(module, entry)
            elif parent is not None and parent.part == "loss":
                self.keep(module, "loss", f"a subclass of {parent.name}, whose forward may differ")
            elif any(child is body for child in module.children() for body in self.bodies):
                self.keep(module, "loss", "it is no causal language model, or a wrapper of one")
            elif not list(module.children()) and entry is None:
                self.keep(module, "-", "nothing here is faster in its place")

    def _head(self, module, entry) -> None:
        from megakern.patching import classes
        from megakern.patching.swapped import head_refusal

        reason = _replaced(module) or (head_refusal(module) if self.wants("loss") else "loss=False")
        if reason:
            self.keep(module, "loss", reason)
        else:
            self.swap(module, entry, "linear_cross_entropy in training")
        if reason and self.wants("attention") and not _replaced(module) and not classes.is_swapped(module):
            classes.swap(module, self.options)  # it refuses to give attention probabilities


# --- what a module is ---


def _original(module: nn.Module) -> type:
    """Its class before it was swapped."""
    return getattr(type(module), "_unpatched", type(module))


def _is(module: nn.Module, part: str) -> bool:
    entry = parent_entry(_original(module))
    return entry is not None and entry.part == part


# --- reasons to leave a module alone ---


def _replaced(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance, by hooks of accelerate or another patch"
    return None


def _norm_refusal(module: nn.Module) -> str | None:
    if getattr(module, "weight", None) is None or module.weight.ndim != 1:
        return "it has no weight, or normalizes over several dims"
    return None


def _mlp_refusal(module: nn.Module) -> str | None:
    from transformers.activations import SiLUActivation

    kind = type(module.act_fn)
    return None if kind in (nn.SiLU, SiLUActivation) else f"its activation is {kind.__name__}, not SiLU"


def _disagreement(body: nn.Module) -> str | None:
    """Why neither rope nor attention of this body can be swapped, or None."""
    if entry_of(_original(body)) is None:
        return f"{_original(body).__name__} is a subclass, whose forward may hand other positions and masks on"
    for module in body.modules():
        entry = parent_entry(_original(module))
        if entry is not None and entry.part in ("attention", "rope"):
            if entry_of(_original(module)) is None:
                return f"{_original(module).__name__} among its layers is a subclass of {entry.name}"
            if reason := _replaced(module):
                return reason
    return None


def _wants_more(config) -> str | None:
    """What this config asks of attention that ours does not do."""
    if getattr(config, "output_attentions", False):
        return "its config asks for attention probabilities, which are never formed"
    if getattr(config, "add_cross_attention", False):
        return "cross-attention has masks of its own"
    return None


# --- configs ---


def _own_config(model: nn.Module, bodies: list[nn.Module], options) -> None:
    """All modules that share a config with a body get a copy, which names our attention."""
    from megakern.patching.attention import NAME

    copies = {}
    for body in bodies:
        body._megakern = options
        if "_megakern_config" not in body.__dict__:
            copies[id(body.config)] = copy.copy(body.config)
            copies[id(body.config)]._attn_implementation_internal = NAME
    for module in model.modules():
        if id(module.__dict__.get("config")) in copies:
            module._megakern_config, module.config = module.config, copies[id(module.config)]


def _merged(changed, original):
    """`original`, the same object, with what was set on `changed` since it was copied, but for the attention."""
    implementation = original._attn_implementation_internal
    original.__dict__.clear()
    original.__dict__.update(changed.__dict__)
    original._attn_implementation_internal = implementation
    return original


# --- checks ---


def _check_arguments(parts, backend) -> None:
    if not parts:
        raise ValueError(f"patch: nothing to do; leave at least one of {', '.join(PARTS)} true")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"patch: unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    if backend is not None and UNAVAILABLE[backend] is not None:
        raise ValueError(f"patch: backend {backend!r} was asked for, but {UNAVAILABLE[backend]}")


def _check_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("patch: transformers is not installed; pip install 'megakern[hf]'") from error
    if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ImportError(
            f"patch: transformers {oldest} or newer is needed, this is {transformers.__version__}; "
            f"pip install -U transformers"
        )


def _check_not_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError("patch: this model is compiled already; call mk.patch first, torch.compile after it")
