"""`megakern eval`: how well a run's model predicts held-out tokens."""

from __future__ import annotations

from pathlib import Path

from megakern.config import require
from megakern.data.loader import check_vocabulary
from megakern.data.manifest import PreparedData
from megakern.inference import load_run
from megakern.train.batches import evaluate
from megakern.train.run import other_tokenizer
from megakern.train.summary import HeldOut


def evaluate_run(run: Path, *, data: Path | None = None, batches: int | None = None) -> str:
    """Loss of RUN's newest model on the held-out tokens of `data` (default: what it was trained with), as text.

    Raises ConfigError, DataError or CheckpointError; data of another tokenizer is refused.
    """
    require(batches is None or batches >= 1, f"--batches must be 1 or more, got {batches}")
    loaded = load_run(run)
    prepared = PreparedData(data or loaded.config.data.path)
    require(
        prepared.tokenizer.sha256 == loaded.tokenizer.sha256,
        other_tokenizer(prepared.folder, prepared.tokenizer, run, loaded.tokenizer),
    )
    check_vocabulary(prepared.validation, loaded.config.model.vocab_size)
    batch = loaded.config.train.batch
    loss = evaluate(loaded.model, prepared, batch, loaded.device, windows=None if batches is None else batches * batch)
    tokens = None if batches is None else batches * batch * loaded.config.model.sequence_length + 1
    rows = [("checkpoint", str(loaded.checkpoint)), *HeldOut.of(loss, prepared, tokens).lines()]
    return "\n".join(f"  {name:<16} {value}" for name, value in rows)
