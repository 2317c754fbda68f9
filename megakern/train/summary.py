"""The end of a run in a few lines: how good, how fast, how large, and where everything is."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megakern.data.ngram import BigramModel, empirical_entropy
from megakern.model.flops import flops_per_token
from megakern.model.gpt import parameter_count
from megakern.parallel import shared
from megakern.train.files import write_atomic
from megakern.train.metrics import quantity
from megakern.train.plot import have_matplotlib, plot_run

if TYPE_CHECKING:
    from megakern.data.manifest import PreparedData
    from megakern.parallel.context import ParallelContext
    from megakern.train.trainer import Trainer


BIGRAM_TOKENS = 50_000_000  # counted for the bigram model: seconds, and more would change the third digit


@dataclass(frozen=True)
class HeldOut:
    """How well the held-out tokens are predicted, beside what counting pairs of tokens gives."""

    loss: float
    """nats a token."""
    bits_per_byte: float | None
    """Of text; None for conversations, as all that follows: their loss is of the answers alone."""
    unigram: float | None
    """Entropy of the held-out tokens, each alone, nats a token."""
    bigram: float | None
    """Cross entropy of a Kneser-Ney bigram model counted on the training text, nats a held-out token."""
    own_pairs: float | None
    """Entropy of the held-out tokens given the token before, counted on the held-out tokens themselves: no fair rival,
    for it has seen the answers, and far too low when there are few tokens to a pair."""

    @classmethod
    def of(cls, loss: float, data: PreparedData, tokens: int | None = None) -> HeldOut:
        """`loss` is that of the first `tokens` held-out tokens; None: of all."""
        if data.template is not None:
            return cls(loss=loss, bits_per_byte=None, unigram=None, bigram=None, own_pairs=None)
        held_out, vocabulary = data.validation.tokens[:tokens], data.tokenizer.vocab_size
        return cls(
            loss=loss,
            bits_per_byte=loss / math.log(2) / data.bytes_per_token("validation"),
            unigram=empirical_entropy(held_out, 1, vocabulary),
            bigram=BigramModel(data.train.tokens[:BIGRAM_TOKENS], vocabulary).cross_entropy(held_out),
            own_pairs=empirical_entropy(held_out, 2, vocabulary),
        )

    def lines(self) -> list[tuple[str, str]]:
        if self.bits_per_byte is None:
            return [
                ("held-out loss", f"{self.loss:.4f} nats a token of the answers, perplexity {math.exp(self.loss):.3f}")
            ]
        verdict = "better" if self.loss < self.bigram else "NOT better"
        return [
            ("held-out loss", f"{self.loss:.4f} nats a token, {self.bits_per_byte:.3f} bits a byte"),
            ("unigram, bigram", f"{self.unigram:.4f}, {self.bigram:.4f} nats a token: {verdict} than the bigram"),
        ]


@dataclass(frozen=True)
class Summary:
    """What RUN/summary.json holds."""

    held_out: HeldOut
    parameters: int
    steps: int
    tokens: int
    precision: str
    processes: int
    tensor_parallel: str
    """Its ranks, and how their collectives travel; empty for one."""
    tokens_per_second: float
    mfu_causal: float
    mfu_full: float
    peak: float
    """FLOP/s that MFU divides by, all processes together."""
    peak_source: str
    memory: int
    """Peak memory of all processes together, bytes."""
    checkpoint: str

    @classmethod
    def of(cls, trainer: Trainer, loss: float, memory: int) -> Summary:
        config = trainer.config
        rate = trainer.tokens_per_second
        return cls(
            held_out=HeldOut.of(loss, trainer.data),
            parameters=parameter_count(config.model),
            steps=trainer.step,
            tokens=trainer.samples * config.model.sequence_length,
            precision=config.train.precision,
            processes=trainer.parallel.world_size,
            tensor_parallel=_tensor_parallel(trainer.parallel),
            tokens_per_second=rate,
            mfu_causal=rate * flops_per_token(config.model, causal=True) / trainer.peak,
            mfu_full=rate * flops_per_token(config.model, causal=False) / trainer.peak,
            peak=trainer.peak,
            peak_source=trainer.peak_source,
            memory=memory,
            checkpoint=str(trainer.saved),
        )

    def write(self, run: Path) -> None:
        """RUN/summary.json, RUN/curve.png, and the summary as text on the standard output."""
        write_atomic(run / "summary.json", (json.dumps(asdict(self), indent=1) + "\n").encode())
        curve = str(plot_run(run)) if have_matplotlib() else "not drawn: pip install 'megakern[plot]'"
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        rows = [
            *self.held_out.lines(),
            ("model", f"{self.parameters / 1e6:.1f} M parameters, {self.precision}, {processes}"),
            ("trained on", f"{self.tokens / 1e6:.2f} M tokens in {self.steps} steps"),
            ("speed", self._speed()),
            ("peak memory", f"{self.memory / 2**30:.2f} GiB, all processes"),
            ("checkpoint", self.checkpoint),
            ("curve", curve),
            ("metrics", str(run / "metrics.jsonl")),
        ]
        if self.tensor_parallel:
            rows.insert(len(self.held_out.lines()) + 1, ("tensor parallel", self.tensor_parallel))
        print("\n".join(f"  {name:<16} {value}" for name, value in rows), flush=True)

    def _speed(self) -> str:
        if not self.tokens_per_second:
            return "none: the last step was made before, and no more were wanted"
        return (
            f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu_causal:.1%} (causal attention half counted) "
            f"or {self.mfu_full:.1%} (full), of {quantity(self.peak, 'FLOP/s')} ({self.peak_source})"
        )


def _tensor_parallel(parallel: ParallelContext) -> str:
    return "" if parallel.tp_size == 1 else f"{parallel.tp_size} ranks, {shared.describe(parallel.tp_group)}"
