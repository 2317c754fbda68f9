"""What `megakern verify` does: settle what is trained, run the reference and every layout, judge them."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megakern.config import require
from megakern.data.progress import Meanwhile
from megakern.model.gpt import parameter_count
from megakern.model.presets import presets
from megakern.ops import dispatch
from megakern.train import machine
from megakern.train.config import RunConfig, dump_config, load_config, make_config
from megakern.train.run import check_run, open_run
from megakern.verify import processes
from megakern.verify.layouts import ALONE, Layout, check_layout, default_layouts, no_room, parse_layout
from megakern.verify.reduce import LIMIT, describe_reduction, reduce_model
from megakern.verify.report import FAILED, NOT_RUN, Report, Row, judge
from megakern.verify.synthetic import write_synthetic
from megakern.verify.tolerances import Measures, bound_of

PRECISIONS = ("fp32", "bf16", "fp16")
PRESET = "tiny-llama"
DROPOUT = 0.1
SEQUENCES = 4  # a step, or the next number that every dp divides
TIMEOUT = 120.0  # seconds for a collective: the models are small
LEAST_EPS = 1e-6  # of AdamW: below it the first updates are the sign of gradients that are nothing but rounding


def verify(
    source: Path | None = None,
    *,
    preset: str | None = None,
    steps: int = 5,
    layouts: Sequence[str] | None = None,
    precisions: Sequence[str] = ("fp32", "bf16"),
    backends: Sequence[str] | None = None,
    full_size: bool = False,
    overrides: Sequence[str] = (),
) -> Report:
    """Train under every layout, precision and backend, and compare each run with one process in fp32 on `torch`.

    source: a CONFIG.toml or a run's folder; None: `preset`, or `PRESET`, on made-up text. layouts: as "tp=2,sp"; None:
    all that the model can be split into and the machine has processes for. backends: names, or "auto" for the automatic
    choice.
    Raises ConfigError or DataError for wrong input, before anything is trained.
    """
    require(steps >= 1, f"--steps must be 1 or more, got {steps}")
    for precision in precisions:
        require(precision in PRECISIONS, f"--precisions: {precision!r} is none of {', '.join(PRECISIONS)}")
    backends = _backends(backends)
    config = _config(source, preset, list(overrides))
    chosen = default_layouts(config.model) if layouts is None else [parse_layout(text) for text in layouts]
    chosen = sorted({ALONE, *chosen})
    for layout in chosen:
        check_layout(layout, config.model)
    with tempfile.TemporaryDirectory(prefix="megakern-verify-") as folder:
        config, notes = _settle(config, chosen, steps, Path(folder), full_size)
        for layout in chosen:
            check_run(layout.of(config, "fp32"), layout.processes)
        for note in notes:
            print(note, flush=True)
        with Meanwhile() as meanwhile:
            rows = _Runs(Path(folder), config, steps, meanwhile).all(chosen, precisions, backends)
    return Report(notes=tuple(notes), rows=tuple(rows))


def _backends(names: Sequence[str] | None) -> Sequence[str]:
    if names is None:
        return ("torch", "auto") if machine.device_type() == "cuda" else ("torch",)
    for name in names:
        known = ("auto", *dispatch.BACKENDS)
        require(name in known, f"--backends: {name!r} is none of {', '.join(known)}")
        reason = None if name == "auto" else dispatch.UNAVAILABLE[name]
        require(reason is None, f"--backends: {name} cannot be used here: {reason}")
    return names


def _config(source: Path | None, preset: str | None, overrides: list[str]) -> RunConfig:
    require(source is None or preset is None, f"verify: name {source} or --preset {preset}, not both")
    if source is None:
        preset = preset or PRESET
        presets[preset]  # raises ConfigError with the nearest name
        table = {"model": {"preset": preset, "dropout": DROPOUT}, "train": {"batch": 4, "micro_batch": 1}}
        return make_config(table, overrides, f"preset {preset}")
    return open_run(source, overrides) if source.is_dir() else load_config(source, overrides)


def _settle(
    config: RunConfig, layouts: list[Layout], steps: int, folder: Path, full_size: bool
) -> tuple[RunConfig, list[str]]:
    """The settings that all runs share, and what to say about them. Writes the data when there is none."""
    real = bool(config.data.path) and Path(config.data.path).exists()
    notes = []
    if not full_size and parameter_count(config.model) > LIMIT:
        tps = [layout.tp for layout in layouts]
        small = reduce_model(config.model, tps, keep_vocabulary=real)
        notes.append(describe_reduction(config.model, small))
        config = dataclasses.replace(config, model=small)
    unit = math.lcm(*(layout.dp for layout in layouts))
    batch = -(-SEQUENCES // unit) * unit
    accumulates = config.train.micro_batch is not None and config.train.micro_batch < config.train.batch
    train = dataclasses.replace(
        config.train,
        steps=steps,
        batch=batch,
        micro_batch=1 if accumulates else None,
        log_every=steps + 1,
        eval_every=0,
        save_every=0,
    )
    optimizer = dataclasses.replace(
        config.optimizer, schedule="constant", warmup_steps=0, decay_steps=0, eps=max(config.optimizer.eps, LEAST_EPS)
    )
    parallel = dataclasses.replace(config.parallel, timeout=min(config.parallel.timeout, TIMEOUT))
    config = dataclasses.replace(config, train=train, optimizer=optimizer, parallel=parallel)
    model = config.model
    if not real:
        tokens = (steps * batch + 2) * model.sequence_length
        write_synthetic(folder / "data", vocab_size=model.vocab_size, tokens=tokens, seed=config.train.seed)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder / "data")))
    notes.append(
        f"model: {parameter_count(model):,} parameters, {model.layers} layers, {model.width} wide, dropout "
        f"{model.dropout}; {steps} steps of {batch} x {model.sequence_length} tokens of "
        + (str(config.data.path) if real else "made-up text")
    )
    return config, notes


class _Runs:
    """Trains one run after the other in folders of its own below `folder`."""

    def __init__(self, folder: Path, config: RunConfig, steps: int, meanwhile: Meanwhile) -> None:
        self.folder, self.config, self.steps, self.meanwhile = folder, config, steps, meanwhile
        self._made = 0

    def all(self, layouts: list[Layout], precisions: Sequence[str], backends: Sequence[str]) -> list[Row]:
        """Every combination as a row; one row that says so when the reference itself fails."""
        total = len(layouts) * len(precisions) * len(backends)
        self.meanwhile.say("the reference")
        try:
            self._reference = self._train(ALONE, "fp32", "torch", None)
        except processes.LayoutError as error:
            names = {"layout": str(ALONE), "processes": 1, "precision": "fp32", "backend": "torch"}
            return [Row(verdict=FAILED, reason=f"the reference itself failed: {error}", **names)]
        rows = []
        for backend in backends:
            for precision in precisions:
                alone: Measures | None = None
                for layout in layouts:
                    if (layout, precision, backend) == (ALONE, "fp32", "torch"):
                        total -= 1
                        continue
                    self.meanwhile.say(f"{len(rows) + 1} of {total}: {layout} {precision} {backend}")
                    row = self._row(layout, precision, backend, alone)
                    if layout == ALONE:
                        alone = row.distance
                    rows.append(row)
        return rows

    def _row(self, layout: Layout, precision: str, backend: str, alone: Measures | None) -> Row:
        names = {"layout": str(layout), "processes": layout.processes, "precision": precision, "backend": backend}
        reason = no_room(layout)
        if reason is not None:
            return Row(verdict=NOT_RUN, reason=reason, **names)
        if layout != ALONE and precision != "fp32" and alone is None:
            return Row(verdict=NOT_RUN, reason="one process in this precision has failed", **names)
        try:
            folder = self._train(layout, precision, backend, self._reference)
        except processes.LayoutError as error:
            return Row(verdict=FAILED, reason=str(error), **names)
        results = [json.loads((each / "result.json").read_text()) for each in (folder, self._reference)]
        return judge(*results, bound_of(precision, alone), **names)

    def _train(self, layout: Layout, precision: str, backend: str, reference: Path | None) -> Path:
        self._made += 1
        folder = self.folder / f"run-{self._made}"
        folder.mkdir()
        (folder / "config.toml").write_text(dump_config(layout.of(self.config, precision)))
        job = {"steps": self.steps, "backend": backend, "reference": None if reference is None else str(reference)}
        (folder / "job.json").write_text(json.dumps(job))
        if layout.processes == 1:
            processes.run_alone(folder)
        else:
            processes.run_processes(folder, layout.processes)
        return folder
