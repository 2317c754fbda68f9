"""The training loop, from a run's settings to its checkpoints, metrics and summary. Read `Trainer.fit` first."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from megakern.data.files import DataError
from megakern.data.manifest import PreparedData
from megakern.layers.dropout import DropoutKey
from megakern.model.flops import flops_per_token
from megakern.ops.grad_norm import clip_coefficient, gradient_norm
from megakern.parallel import trace
from megakern.parallel.collectives import finish_gradients
from megakern.parallel.context import ParallelContext
from megakern.parallel.data import begin_pass
from megakern.train import checkpoint, machine
from megakern.train.agreement import Outcome, agree
from megakern.train.batches import Batches, evaluate, loss_of, make_loader
from megakern.train.build import make_model, make_optimizer
from megakern.train.config import RunConfig, as_table
from megakern.train.launch import StopRequest
from megakern.train.metrics import MetricsFile, ProgressLine
from megakern.train.saver import Saver
from megakern.train.scaler import LossScaler
from megakern.train.schedule import learning_rate
from megakern.train.start import Base, check_base, load_base, require_optimizer, start
from megakern.train.state_bytes import state_bytes
from megakern.train.summary import Summary


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""


class Trainer:
    """Trains the model of `config` on the data of `config`, in the folder `run`, as one of the ranks of `parallel`.

    Starts from the newest valid checkpoint in RUN/ckpt, or from the initial weights when there is none. All random
    choices are functions of (seed, step, sample), so a resumed run goes on bit for bit.
    """

    def __init__(self, config: RunConfig, run: Path, parallel: ParallelContext) -> None:
        self.config, self.run, self.parallel = config, run, parallel
        self.device = parallel.device() if parallel.mesh is not None else torch.device(machine.device_type())
        self.data = PreparedData(config.data.path)
        model, seed = config.model, config.train.seed
        self.loader = make_loader(self.data, model.sequence_length, seed, vocab_size=model.vocab_size)
        self.batches = Batches(self.loader, self.device)
        precision = machine.DTYPES[config.train.precision]
        torch.set_float32_matmul_precision(config.train.matmul_precision)
        self.model = make_model(config, parallel, self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = LossScaler() if precision == torch.float16 else None
        self.step = 0
        self.updates = 0  # steps that were not skipped
        self.samples = 0  # sequences consumed: the position in the data, and all the state the loader has
        self.skipped_in_a_row = 0
        self.stop = StopRequest()
        self.outcome: Outcome | None = None  # of the newest step
        self.base = Base.of(config) if config.lora.rank else None
        self.saver = Saver(run / "ckpt", parallel, config.train, config.parallel, self._log_failed_save)
        self._restore()
        first = parallel.world_rank == 0
        if first:
            layout = {"tp": parallel.tp_size, "dp": parallel.size("dp"), "replicas": config.parallel.replicas}
            states = state_bytes(config.model, config.optimizer, **layout)
            print(f"states: {adapters_of(self.model) if config.lora.rank else states}", flush=True)
        self.metrics = MetricsFile(run / "metrics.jsonl", self.step) if first else None
        self.progress = ProgressLine(config.train.steps, config.train.log_every) if first else None
        peak, self.peak_source = machine.peak_rate(precision, self.device)
        self.peak = peak * parallel.world_size
        self._busy, self._busy_tokens = 0.0, 0  # seconds and tokens of the steps of this process, for rates

    # --- the loop ---

    def fit(self, stop: StopRequest) -> int:
        """Train to the last step; returns 0, or the number of the signal that stopped it (a checkpoint is saved)."""
        try:
            number = self._loop(stop)
        except (NonFiniteError, DataError) as error:  # on every rank: what was staged is still worth having
            self.saver.wait_after(error)
            raise
        if number:
            return number
        if self.progress:
            self.progress.end()
        self.saver.wait()
        if self.saved is None or self.saved.name != checkpoint.folder_name(self.step):
            self.save(last=True)
        self._finish()
        return 0

    def _loop(self, stop: StopRequest) -> int:
        settings, self.stop = self.config.train, stop
        while self.step < settings.steps:
            self.train_step()
            self.saver.poll(self.outcome.written)
            # Evaluation first: killed between the two, a resumed run makes both again, and no record is missing.
            if settings.eval_every and self.step % settings.eval_every == 0 and self.step < settings.steps:
                self._log_evaluation(self.evaluate(settings.eval_batches))
            if number := self.outcome.signal:
                self.save(last=True)
                self._say(
                    f"stopped by signal {number} after step {self.step} of {settings.steps}; saved {self.saved}\n"
                    f"resume with: megakern train --resume {self.run}"
                )
                return number
            if settings.save_every and self.step % settings.save_every == 0 and self.step < settings.steps:
                self.save()
        return 0

    def train_step(self) -> None:
        """One step on the next batch: gradients, update (or a skip, when they are not finite), a line of metrics."""
        settings, optimizer = self.config.train, self.config.optimizer
        started = time.perf_counter()
        trace.begin_step(self.step)
        lr = learning_rate(self.step, settings.steps, optimizer)
        loss = self._gradients()
        finish_gradients(self.model.parameters())
        trace.phase("gradient norm")
        norm = gradient_norm(self.model.parameters())
        if self.scaler:
            norm = norm / self.scaler.scale
        outcome = agree(loss, norm, self.parallel, signal=self.stop.number, written=self.saver.written)
        self.outcome, finite = outcome, outcome.finite
        if finite:
            trace.phase("optimizer step")
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step(grad_scale=self._gradient_scale(norm, outcome.norm))
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler:
            self.scaler.update(finite)
        self.step += 1
        self.samples += settings.batch
        self._log_step(outcome.loss, outcome.norm, lr, finite, time.perf_counter() - started)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= settings.max_skipped:
            raise NonFiniteError(
                f"step {self.step}: the gradient was not finite for {self.skipped_in_a_row} steps in a row, and those "
                f"steps were skipped; lower optimizer.lr, or resume from {self.run / 'ckpt'} with another setting"
            )

    def _gradient_scale(self, norm: torch.Tensor, norm_value: float) -> torch.Tensor | None:
        """The factor on the gradients for clipping and unscaling; None for 1, which saves the update a pass."""
        clip = self.config.optimizer.clip
        clips = clip > 0 and norm_value > clip
        if not clips and not self.scaler:
            return None
        scale = clip_coefficient(norm, clip) if clips else torch.ones_like(norm)
        return scale / self.scaler.scale if self.scaler else scale

    def _gradients(self) -> torch.Tensor:
        """Forward and backward over this rank's micro-batches of one step; returns their mean loss in nats a token,
        which a GPU may still be computing.

        Of conversations each answer token of the whole batch weighs the same, whatever the layout: the losses of the
        ranks are parts of a sum, whose mean over dp is that of the step.

        Pass i of dp rank d takes the samples from (i dp + d) rows on, so that each layout trains on the same ones.
        """
        settings, dp = self.config.train, self.parallel.size("dp")
        rows = settings.rows(dp)
        passes = settings.batch // (rows * dp)
        total = torch.zeros((), device=self.device)
        share, reduction = passes, "mean"
        if self.data.template is not None:
            share, reduction = self.loader.answers(self.samples, settings.batch) / dp, "sum"
        for index in range(passes):
            first = (index * dp + self.parallel.rank("dp")) * rows
            batch = self.batches.take(self.samples + first, rows)
            begin_pass(self.model, zero=self.config.parallel.zero, last=index == passes - 1)
            key = DropoutKey(seed=settings.seed, step=self.step, first_sample=first)
            trace.phase(f"forward of micro-batch {index + 1} of {passes}")
            loss = loss_of(self.model, batch, reduction=reduction, dropout_key=key) / share
            trace.phase(f"backward of micro-batch {index + 1} of {passes}")
            (loss * self.scaler.scale if self.scaler else loss).backward()
            total += loss.detach()
            if index + 1 < passes or self.step + 1 < settings.steps:
                self.batches.prepare(self.samples + first + dp * rows, rows)  # of the next step too
        return total

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, batches: int | None = None) -> float:
        """Mean loss in nats a token over the first `batches` batches of the held-out tokens; None: over all."""
        trace.phase("evaluation")
        train = self.config.train
        windows = None if batches is None else batches * train.batch
        rows = train.rows(self.parallel.size("dp"))
        return evaluate(self.model, self.data, rows, self.device, windows=windows, parallel=self.parallel)

    # --- checkpoints ---

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What learns: all weights, or the adapters alone."""
        names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        tensors = {f"model.{name}": parameter for parameter, name in names.items()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim == parameter.ndim and value.shape == parameter.shape:
                    tensors[f"optimizer.{key}.{names[parameter]}"] = value
        return tensors

    @property
    def saved(self) -> Path | None:
        """The newest checkpoint that is known to be complete: of this step, or of an earlier one."""
        return self.saver.saved

    def save(self, *, last: bool = False) -> None:
        """Write RUN/ckpt/step-XXXXXXXX, or begin to; everything a resume needs is in it. `last`: see `Saver.save`."""
        trace.phase(f"saving after step {self.step}")
        state = {
            "step": self.step,
            "samples": self.samples,
            "updates": self.updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": self.scaler.state() if self.scaler else None,
            "config": {name: part for name, part in as_table(self.config).items() if name != "data"},  # no local paths
            "tokenizer_sha256": self.data.tokenizer.sha256,
            **({"base": self.base.state()} if self.base else {}),
        }
        self.saver.save(self.step, self._tensors(), state, last=last)

    def _restore(self) -> None:
        trace.phase("loading the newest checkpoint")
        try:
            path = checkpoint.newest(self.run / "ckpt", self.parallel)
        except checkpoint.NoCheckpointError:
            start(self.model, self.optimizer, self.config)
            return  # a new run
        require_optimizer(path)
        self.optimizer.start_state(0)
        state = checkpoint.load(path, self._tensors(), self.parallel)
        checkpoint.require_tokenizer(state, self.data.tokenizer.sha256, path)
        if self.base:
            check_base(state, self.base, path)
            load_base(self.model, self.base.path)
        self.optimizer.start_state(state["updates"])
        self.step, self.samples, self.updates = state["step"], state["samples"], state["updates"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        if self.scaler:
            self.scaler.restore(state["scaler"])
        self.saver.saved = path
        if self.parallel.world_rank == 0:
            print(f"resumed from {path} at step {self.step}", flush=True)

    # --- what the user sees ---

    @property
    def tokens_per_second(self) -> float:
        """Over all steps of this process, without evaluation and saving; 0 when it made none."""
        return self._busy_tokens / self._busy if self._busy else 0.0

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    def _log_step(self, loss: float, norm: float, lr: float, finite: bool, seconds: float) -> None:
        if not self.metrics:
            return
        settings, model = self.config.train, self.config.model
        tokens = settings.batch * model.sequence_length
        rate = tokens / seconds
        flops = {kind: flops_per_token(model, causal=kind == "causal") for kind in ("causal", "full")}
        self.metrics.write(
            kind="train",
            step=self.step - 1,
            loss=loss,
            gradient_norm=norm if finite else None,
            skipped=not finite,
            lr=lr,
            tokens=self.samples * model.sequence_length,
            tokens_per_second=rate,
            mfu_causal=rate * flops["causal"] / self.peak,
            mfu_full=rate * flops["full"] / self.peak,
            loss_scale=self.scaler.scale if self.scaler else None,
            memory=machine.peak_memory(self.device),
            seconds=seconds,
        )
        self._busy += seconds
        self._busy_tokens += tokens
        self.progress.update(
            self.step,
            loss=loss,
            rate=rate,
            mfu=rate * flops["causal"] / self.peak,
            left=(settings.steps - self.step) * tokens / self.tokens_per_second,
        )

    def _log_failed_save(self, step: int, error: checkpoint.CheckpointWriteError) -> None:
        if self.metrics:
            self.metrics.write(kind="save", step=step - 1, failed=True, failures=self.saver.failures, error=str(error))

    def _log_evaluation(self, loss: float, **more: float) -> None:
        if self.metrics:
            tokens = self.samples * self.config.model.sequence_length
            self.metrics.write(kind="eval", step=self.step - 1, loss=loss, tokens=tokens, **more)
            self._say(f"step {self.step}: held-out loss {loss:.4f}")

    def _finish(self) -> None:
        """Evaluate on all held-out tokens, then write the curve and print the summary."""
        self._say("evaluating on all held-out tokens")
        loss = self.evaluate()
        memory = torch.tensor([float(machine.peak_memory(self.device))], device=self.device)
        if self.parallel.mesh is not None:
            trace.collective("all_reduce", memory, None)
            dist.all_reduce(memory, op=dist.ReduceOp.SUM)
        if self.parallel.world_rank == 0:
            summary = Summary.of(self, loss, int(memory.item()))
            self._log_evaluation(loss, unigram=summary.held_out.unigram, bigram=summary.held_out.bigram)
            self.metrics.close()
            summary.write(self.run)


def adapters_of(model: torch.nn.Module) -> str:
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or not learns) for learns in (True, False)]
    return f"{counts[0]:,} of {counts[1]:,} parameters learn, in adapters; the others are as in train.init_from"
