"""The settings of a run: sections of a TOML file, with dotted overrides from the command line."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from megakern.config import (
    RECOMPUTE,
    RECOMPUTE_DEFAULT,
    RECOMPUTE_MODULES,
    ConfigError,
    GPTConfig,
    from_table,
    known_keys,
    refuse_unknown,
    require,
)
from megakern.layers.lora import TARGETS
from megakern.model.presets import presets
from megakern.parallel.data import ZERO

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MATMUL_PRECISIONS = ("highest", "high", "medium")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
ON_SAVE_ERROR = ("stop", "continue")
STATE_DTYPES = ("float32", "bfloat16")
MASTERS = ("none", "fp32", "split")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are."""

    path: str = ""
    """Folder that `megakern prepare` made."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is split over processes."""

    tp: int = 1
    """Tensor-parallel size: processes that share the weights of each layer."""
    dp: int | None = None
    """Data-parallel size: groups of tp processes with samples of their own. None: what tp leaves of the processes."""
    replicas: int = 1
    """Copies of the training state over dp; each is sharded over dp / replicas. With dp copies nothing is sharded."""
    zero: int = 1
    """What dp shards: 1 optimizer states; 2 also gradients between micro-batches; 3 also weights between passes."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel layers over the sequence: less memory, the same traffic and losses."""
    overlap_rows: int | None = None
    """From so many rows a rank on, sequence-parallel collectives overlap in pieces. None: 512 on GPUs. 0: never."""
    fused_collectives: bool = False
    """PyTorch's fused symmetric-memory operators for them instead; refused, with the reason, where they cannot run."""
    timeout: float = 600.0
    """Seconds after which a collective that does not finish ends the run."""

    def __post_init__(self) -> None:
        require(self.tp >= 1, f"parallel.tp must be 1 or more, got {self.tp}")
        require(self.dp is None or self.dp >= 1, f"parallel.dp must be 1 or more, got {self.dp}")
        require(self.replicas >= 1, f"parallel.replicas must be 1 or more, got {self.replicas}")
        require(self.zero in ZERO, f"parallel.zero must be 1, 2 or 3, got {self.zero}")
        rows = self.overlap_rows
        require(rows is None or rows >= 0, f"parallel.overlap_rows must be 0 (never) or more, got {rows}")
        require(self.timeout > 0, f"parallel.timeout must be above 0 seconds, got {self.timeout}")

    def over(self, processes: int) -> ParallelConfig:
        """These settings with dp filled in for this many processes. Raises ConfigError when they do not fit."""
        dp = max(1, processes // self.tp) if self.dp is None else self.dp
        require(
            self.tp * dp == processes,
            f"parallel.tp = {self.tp} x parallel.dp = {dp} needs {self.tp * dp} processes, but there are {processes}; "
            f"start {self.tp * dp} with --nproc {self.tp * dp}, or change one of the two",
        )
        require(
            dp % self.replicas == 0,
            f"parallel.replicas = {self.replicas} does not divide parallel.dp = {dp}; choose one that does",
        )
        return dataclasses.replace(self, dp=dp)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 6e-4
    """Peak learning rate."""
    embedding_lr_scale: float = 1.0
    """The token embedding learns at `lr` times this; its rows are seen seldom, so small models gain from 10 or more."""
    min_lr_ratio: float = 0.1
    """The schedule ends at this fraction of `lr`."""
    schedule: str = "cosine"
    """cosine, linear, constant, or wsd (warm-up, stable, decay)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int = 0
    """wsd: steps of linear decay at the end."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""
    clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""
    state_dtype: str = "float32"
    """dtype of both moments: float32 or bfloat16."""
    master: str = "none"
    """none: fp32 parameters, cast as they are read. fp32: parameters in the precision of training, fp32 masters beside
    them. split: bf16 parameters and the 16 bits that they lack, 2 bytes a parameter less, the same bits trained."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr must be above 0, got {self.lr}")
        require(
            self.embedding_lr_scale > 0, f"optimizer.embedding_lr_scale must be above 0, got {self.embedding_lr_scale}"
        )
        require(0 <= self.min_lr_ratio <= 1, f"optimizer.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        require(
            self.schedule in SCHEDULES,
            f"optimizer.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}",
        )
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps must be 0 or more, got {self.warmup_steps}")
        require(self.decay_steps >= 0, f"optimizer.decay_steps must be 0 or more, got {self.decay_steps}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} must be in [0, 1), got {value}")
        require(self.eps > 0, f"optimizer.eps must be above 0, got {self.eps}")
        require(self.weight_decay >= 0, f"optimizer.weight_decay must be 0 or more, got {self.weight_decay}")
        require(self.clip >= 0, f"optimizer.clip must be 0 or more, got {self.clip}")
        require(
            self.state_dtype in STATE_DTYPES,
            f"optimizer.state_dtype must be one of {', '.join(STATE_DTYPES)}, got {self.state_dtype!r}",
        )
        require(self.master in MASTERS, f"optimizer.master must be one of {', '.join(MASTERS)}, got {self.master!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how much at once, how exact, and what is written when."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch: int = 16
    """Sequences a step, over all processes and micro-batches."""
    micro_batch: int | None = None
    """Sequences of one dp rank in one forward and backward pass. None: `batch` / dp, no gradient accumulation."""
    precision: str = "auto"
    """fp32, bf16, fp16 (with loss scaling), or auto: bf16 on GPUs that have it and on CPUs where it measures faster."""
    matmul_precision: str = "highest"
    """How fp32 operands are multiplied: highest: in fp32; medium: rounded to bf16 where that is faster (CPUs with
    AVX512-BF16 or AMX; GPUs take TF32), high: as TF32 on GPUs. Sums stay fp32, as do parameters and activations. Holds
    for PyTorch's products, in the whole process: `torch.set_float32_matmul_precision`."""
    recompute: str = "none"
    """What backward computes again to save memory: none, selective (`recompute_modules`), or full (each block)."""
    recompute_modules: tuple[str, ...] = RECOMPUTE_DEFAULT
    """selective recomputes these: attention (its core), mlp, norm."""
    init_from: str = ""
    """Run, or checkpoint of one, whose weights to start from, and whose model is the default; see also [lora]."""
    seed: int = 1234
    """Seed of the initial weights, dropout and data order."""
    log_every: int = 10
    """Steps between lines of the log, and how many its loss and rate are means of; the metrics file has each step."""
    eval_every: int = 0
    """Steps between evaluations on held-out tokens. 0: only at the end."""
    eval_batches: int = 8
    """Batches of an evaluation during training; the last evaluation reads all held-out tokens."""
    save_every: int = 0
    """Steps between checkpoints. 0: only at the end, and when interrupted."""
    keep: int = 2
    """Checkpoints to keep, at least 2: the newest and one to fall back to."""
    async_save: bool = False
    """Copy what is saved to host memory, and write it in a thread while training goes on. Takes one more copy of it."""
    on_save_error: str = "stop"
    """stop, or continue: what a checkpoint that cannot be written means. The last one of a run always stops."""
    max_skipped: int = 20
    """Steps in a row with a non-finite gradient, all skipped, after which the run ends with exit code 3."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "eval_batches", "max_skipped"):
            require(getattr(self, name) >= 1, f"train.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("eval_every", "save_every"):
            require(getattr(self, name) >= 0, f"train.{name} must be 0 or more, got {getattr(self, name)}")
        require(0 <= self.seed < 2**32, f"train.seed must be in [0, 2^32), got {self.seed}")
        require(self.keep >= 2, f"train.keep must be 2 or more, got {self.keep}")
        require(
            self.micro_batch is None or (self.micro_batch >= 1 and self.batch % self.micro_batch == 0),
            f"train.batch = {self.batch} must be a multiple of train.micro_batch = {self.micro_batch}",
        )
        choices = {"precision": PRECISIONS, "matmul_precision": MATMUL_PRECISIONS, "recompute": RECOMPUTE}
        for name, allowed in (*choices.items(), ("on_save_error", ON_SAVE_ERROR)):
            value = getattr(self, name)
            require(value in allowed, f"train.{name} must be one of {', '.join(allowed)}, got {value!r}")
        modules = self.recompute_modules
        require(
            bool(modules) and set(modules) <= set(RECOMPUTE_MODULES),
            f"train.recompute_modules must be some of {', '.join(RECOMPUTE_MODULES)}, got {list(modules)}",
        )

    def rows(self, dp: int) -> int:
        """Sequences of one of `dp` ranks in a forward pass. Raises ConfigError when the batch cannot be shared out."""
        unit = (self.micro_batch or 1) * dp
        if self.batch % unit:
            near = [size for size in (self.batch // unit * unit, (self.batch // unit + 1) * unit) if size]
            raise ConfigError(
                f"train.batch = {self.batch} must be a multiple of parallel.dp = {dp}"
                + ("" if self.micro_batch is None else f" x train.micro_batch = {self.micro_batch}")
                + f"; the nearest that are: {', '.join(map(str, near))}"
            )
        return self.micro_batch or self.batch // dp


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: the weights of `train.init_from` stay, and products of small matrices learn."""

    rank: int = 0
    """Rank of each adapter. 0: none, all weights learn."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Linear layers that have one: qkv, proj (both of attention), fc (all of the MLP)."""
    dropout: float = 0.0
    """Part of what an adapter reads that is dropped in training; the weights themselves read all of it."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank must be 0 or more, got {self.rank}")
        require(self.alpha > 0, f"lora.alpha must be above 0, got {self.alpha}")
        require(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), got {self.dropout}")
        require(
            bool(self.targets) and set(self.targets) <= set(TARGETS),
            f"lora.targets must be some of {', '.join(TARGETS)}, got {list(self.targets)}",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on, except the data itself."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require(
            self.lora.rank == 0 or bool(self.train.init_from),
            "lora.rank needs train.init_from: the run whose weights the adapters are added to",
        )
        master, precision = self.optimizer.master, self.train.precision
        allowed = {"none": PRECISIONS, "fp32": ("auto", "bf16", "fp16"), "split": ("auto", "bf16")}[master]
        require(
            precision in allowed,
            f"optimizer.master = {master!r} needs train.precision {' or '.join(allowed[1:])}, got {precision} (given, "
            f"or chosen for this machine); change one of the two",
        )

    @property
    def parameter_precision(self) -> str:
        """What the parameters are stored in: fp32, or with masters beside them the precision of training."""
        return "fp32" if self.optimizer.master == "none" else self.train.precision


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a TOML file and apply `--section.key value` overrides.

    `model.preset` names a preset whose values the other `model` keys change. Raises ConfigError.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the .toml file of the settings") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return make_config(table, overrides or [], str(path))


def make_config(table: dict[str, Any], overrides: list[str], source: str) -> RunConfig:
    """The settings in `table`, as TOML gives it, with overrides. Raises ConfigError that names `source`."""
    changes = parse_overrides(overrides)
    for where, layer in ((source, table), ("command line", changes)):
        _check_alone(layer, where)
    return from_table(RunConfig, _with_base(_with_preset(_merge(table, changes), source), source), source)


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["--train.lr", "3e-4", "--model.norm=rmsnorm"]` -> {"train": {"lr": 3e-4}, "model": {"norm": "rmsnorm"}}.

    Values are TOML values; what is not one is a string. Raises ConfigError for a word that is no override.
    """
    table: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or "." not in word:
            near = _nearest_override(word)
            raise ConfigError(
                f"command line: {word!r} is not an option; settings are written --section.key value{near}"
            )
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: {word} needs a value")
            value = rest.pop(0)
        section, _, name = key.partition(".")
        target = table.setdefault(section, {})
        for part in name.split(".")[:-1]:
            target = target.setdefault(part, {})
        target[name.split(".")[-1]] = _toml_value(value)
    return table


def _nearest_override(word: str) -> str:
    keys = [key for key in known_keys(RunConfig) if key.endswith("." + word.lstrip("-").partition("=")[0])]
    return f"; did you mean --{keys[0]}?" if keys else ""


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_alone(table: dict[str, Any], source: str) -> None:
    """Unknown keys are blamed on the file or the command line that has them."""
    model = table.get("model")
    if isinstance(model, dict) and "preset" in model:
        table = {**table, "model": {key: value for key, value in model.items() if key != "preset"}}
    refuse_unknown(RunConfig, table, source)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _with_preset(table: dict[str, Any], source: str) -> dict[str, Any]:
    model = dict(table.get("model", {}))
    name = model.pop("preset", None)
    if name is None:
        return table
    if not isinstance(name, str):
        raise ConfigError(f"{source}: model.preset must be a name, got {name!r}")
    try:
        preset = presets[name]
    except KeyError as error:
        raise ConfigError(f"{source}: {error.args[0]}") from error
    return {**table, "model": {**as_table(preset), **model}}


def base_run(named: Path) -> Path:
    """The run that `train.init_from` names, itself or by a checkpoint of it."""
    return named.parent.parent if named.parent.name == "ckpt" else named


def _with_base(table: dict[str, Any], source: str) -> dict[str, Any]:
    """The model of `train.init_from`, under what the table says of it."""
    train = table.get("train", {})
    named = train.get("init_from") if isinstance(train, dict) else None
    path = base_run(Path(named)) / "config.toml" if isinstance(named, str) and named else None
    if path is None or not path.exists():  # a run goes on without it; a new one is refused later
        return table
    return {**table, "model": {**as_table(load_config(path).model), **table.get("model", {})}}


def as_table(config: Any) -> dict[str, Any]:
    """The dataclass as nested dicts for TOML or JSON, without the keys that are None (TOML has no null)."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return list(value) if isinstance(value, tuple) else value

    return clean(dataclasses.asdict(config))


def dump_config(config: RunConfig) -> str:
    return tomli_w.dumps(as_table(config))


def describe_settings() -> str:
    """Every setting with its default and meaning, for --help."""
    lines = []
    for section in dataclasses.fields(RunConfig):
        cls = section.default_factory
        notes = _field_docs(cls)
        lines.append(f"\n[{section.name}]  {cls.__doc__.splitlines()[0]}")
        for item in dataclasses.fields(cls):
            default = "" if item.default is None else item.default
            lines.append(f"  --{section.name}.{item.name:<20} {default!s:<10} {notes.get(item.name, '')}")
    lines.append(f"\nmodel.preset: one of {', '.join(presets)}")
    return "\n".join(lines)


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field, read from the source."""
    import ast
    import inspect
    import itertools
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    docs = {}
    for first, second in itertools.pairwise(body):
        if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant):
            docs[first.target.id] = str(second.value.value)
    return docs
