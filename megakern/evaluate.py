"""`megakern eval`: how well a run's model predicts held-out tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megakern.config import require
from megakern.data.files import DataError
from megakern.data.loader import check_vocabulary
from megakern.data.manifest import PreparedData
from megakern.data.progress import Progress
from megakern.data.tokenizer import Tokenizer
from megakern.inference import Loaded, load_run
from megakern.model.generate import complete
from megakern.scoring import score_text
from megakern.train.batches import evaluate
from megakern.train.run import other_tokenizer
from megakern.train.summary import HeldOut

TOGETHER = 64
"""Answers that are generated at once."""


def evaluate_run(run: Path, *, data: Path | None = None, batches: int | None = None, answers: int = 0) -> str:
    """Loss of RUN's newest model on the held-out tokens of `data` (default: what it was trained with), as text.

    answers: of conversations, also generate so many held-out answers, and count those that are right word for word.
    Raises ConfigError, DataError or CheckpointError; data of another tokenizer is refused.
    """
    require(batches is None or batches >= 1, f"--batches must be 1 or more, got {batches}")
    require(answers >= 0, f"--answers must be 0 or more, got {answers}")
    loaded = load_run(run)
    prepared = PreparedData(data or loaded.config.data.path)
    require(
        prepared.tokenizer.sha256 == loaded.tokenizer.sha256,
        other_tokenizer(prepared.folder, prepared.tokenizer, run, loaded.tokenizer),
    )
    require(answers == 0 or prepared.template is not None, f"--answers: {prepared.folder} is text, not conversations")
    check_vocabulary(prepared.validation, loaded.config.model.vocab_size)
    batch = loaded.config.train.batch
    loss = evaluate(loaded.model, prepared, batch, loaded.device, windows=None if batches is None else batches * batch)
    tokens = None if batches is None else batches * batch * loaded.config.model.sequence_length + 1
    rows = [("checkpoint", str(loaded.checkpoint)), *HeldOut.of(loss, prepared, tokens).lines()]
    if answers:
        rows.append(("answers", describe(answer_held_out(loaded, prepared, answers), loaded.tokenizer)))
    return "\n".join(f"  {name:<16} {value}" for name, value in rows)


def evaluate_text(run: Path, file: Path, *, stride: int | None = None) -> str:
    """Perplexity and bits a byte of RUN's newest model on a file in UTF-8, as text; see `score_text`.

    Raises ConfigError, DataError or CheckpointError.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    loaded = load_run(run)
    rows = [("checkpoint", str(loaded.checkpoint)), *score_text(loaded, text, stride=stride).lines()]
    return "\n".join(f"  {name:<16} {value}" for name, value in rows)


@dataclass(frozen=True)
class Answer:
    """A turn of the assistant in held-out data, and what the model says in its place. Token ids."""

    before: list[int]
    wanted: list[int]
    found: list[int]


def answer_held_out(loaded: Loaded, data: PreparedData, limit: int) -> list[Answer]:
    """The first `limit` held-out answers, each generated greedily after all that comes before it, together."""
    mask, start, asked = data.answers("validation"), 0, []
    for document in (data.validation[i].tolist() for i in range(len(data.validation))):
        counts = mask[start : start + len(document)].tolist()
        edges = [i for i in range(1, len(counts)) if counts[i] != counts[i - 1]] + [len(counts)]
        asked += [(document[:a], document[a:b]) for a, b in pairwise(edges) if counts[a]]
        start += len(document)
        if len(asked) >= limit:
            break
    asked = asked[:limit]
    found: list[Answer] = []
    with Progress(len(asked), "answering", unit=" answers") as progress:
        for i in range(0, len(asked), TOGETHER):
            some = asked[i : i + TOGETHER]
            longest = max(len(wanted) for _, wanted in some)
            how = {"max_new_tokens": longest, "stop_tokens": loaded.stop_tokens}
            done = complete(loaded.model, [before for before, _ in some], **how)
            found += [
                Answer(*pair, each.tokens[: len(pair[1])] if each.finish == "length" else each.tokens)
                for pair, each in zip(some, done, strict=True)
            ]
            progress.update(len(some))
    return found


def describe(answers: list[Answer], tokenizer: Tokenizer) -> str:
    """How many are right, and the first that is not."""
    wrong = [each for each in answers if each.found != each.wanted]
    text = f"{len(answers) - len(wrong)} of {len(answers)} right word for word ({1 - len(wrong) / len(answers):.3f})"
    if wrong:
        wanted, found = (tokenizer.decode(ids) for ids in (wrong[0].wanted, wrong[0].found))
        text += f"; not {wanted!r}, but {found!r}"
    return text
