"""Training on conversations: who counts in the loss, documents apart, every layout the same, exact resume. On a CPU."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from megakern.cli import main
from megakern.config import ConfigError, GPTConfig
from megakern.data.chat import ChatTemplate
from megakern.data.files import DataError
from megakern.data.loader import IGNORE
from megakern.data.manifest import PreparedData
from megakern.data.packing import PackedLoader, PackedRows, best_fit, packed_validation_batches
from megakern.data.prepare import ChatOptions, prepare
from megakern.data.tokenizer import EOD
from megakern.evaluate import answer_held_out, describe
from megakern.inference import load_run
from megakern.layers.dropout import DropoutKey
from megakern.model.gpt import GPT
from megakern.parallel.collectives import finish_gradients
from megakern.parallel.context import ParallelContext
from megakern.train.batches import evaluate
from tests import runs
from tests.closeness import assert_close_to_ref

T = 48
MODEL = GPTConfig(layers=2, width=32, heads=4, kv_heads=2, vocab_size=257, sequence_length=T, positions="rope")


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def talks(count: int) -> list[dict]:
    draw = random.Random(7)
    lines = []
    for number in range(count):
        word = "".join(draw.choices("abcdef", k=draw.randint(1, 6)))
        if number % 3:
            lines.append({"prompt": f"{number}", "response": word})
        else:
            turns = [("user", "q"), ("assistant", word), ("user", f"{number}"), ("assistant", "b")]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.append({"messages": messages[: 2 + number % 2 * 2]})
    return lines


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    lines = write_lines(folder / "talk.jsonl", talks(60))
    options = ChatOptions(longest=T + 1, too_long="skip")
    prepare(lines, folder / "data", tokenizer="bytes", validation_fraction=0.2, chat=options, progress=False)
    return folder / "data"


# --- data ---


def test_the_mask_is_the_hand_made_one(tmp_path):
    lines = [
        {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "yes"))]},
        {"prompt": "p", "response": "no", "system": "t", "id": 3},
    ]
    path = write_lines(tmp_path / "a.jsonl", lines)
    manifest = prepare(path, tmp_path / "out", tokenizer="bytes", chat=ChatOptions(), progress=False)
    data = PreparedData(tmp_path / "out")
    data.verify()
    eod = bytes([0])  # shown as one byte here
    wanted = {
        eod + b"system\ns" + eod + b"user\nu" + eod + b"assistant\nyes" + eod: b"." * 27 + b"yes" + eod,
        eod + b"system\nt" + eod + b"user\np" + eod + b"assistant\nno" + eod: b"." * 27 + b"no" + eod,
    }
    found = {}
    for split in ("train", "validation"):
        dataset, mask = getattr(data, split), data.answers(split)
        tokens = bytes(0 if token == 256 else token for token in dataset[0].tolist())
        assert len(dataset) == 1 and len(mask) == len(tokens)
        found[tokens] = bytes(token if counts else ord(".") for token, counts in zip(tokens, mask, strict=True))
    assert found == wanted
    assert manifest.train.answers + manifest.validation.answers == 4 + 3
    assert json.loads((tmp_path / "out/generation.json").read_text()) == {"eos_token_ids": [256]}


def test_rows_hold_each_conversation_once_and_nothing_else(chat_data):
    data = PreparedData(chat_data)
    rows = PackedRows(data.train, data.answers("train"), T)
    loader = PackedLoader(rows, seed=3, vocab_size=257)
    epochs = []
    for epoch in range(2):
        seen, answers = [], 0
        for index in range(epoch * len(rows), (epoch + 1) * len(rows)):
            tokens, targets, ends = loader.batch(index, 1)
            assert ends[0] == 0 and ends[-1] == T and len(ends) == rows.documents + 1
            for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
                if stop > start and tokens[0, start] != 0:
                    seen.append(tuple(tokens[0, start:stop].tolist()))
                    known = targets[0, start : stop - 1]
                    assert torch.equal(known[known != IGNORE], tokens[0, start + 1 : stop][known != IGNORE])
            count = int((targets != IGNORE).sum())
            assert count == loader.answers(index, 1)
            answers += count
        epochs.append(seen)
        assert sorted(seen) == sorted(tuple(document[:-1].tolist()) for document in map(np.asarray, data.train))
        assert answers == data.manifest.train.answers
    assert epochs[0] != epochs[1]
    tokens, _, ends = loader.batch(len(rows) - 1, 3)  # across two epochs: rows are what they are alone
    assert all(torch.equal(tokens[i], loader.batch(len(rows) - 1 + i, 1)[0][0]) for i in range(3))
    assert ends[:: rows.documents].tolist() == [0, T, 2 * T, 3 * T]


def test_packing_wastes_little_and_every_row_fits():
    sizes = np.random.RandomState(0).randint(1, 65, 3000)
    rows = best_fit(sizes, 64)
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    assert all(sizes[row].sum() <= 64 for row in rows)
    assert len(rows) <= 1.02 * sizes.sum() / 64 + 1


def test_held_out_rows_are_shared_out(chat_data):
    data = PreparedData(chat_data)
    rows = PackedRows(data.validation, data.answers("validation"), T)
    whole = torch.cat([targets for _, targets, _ in packed_validation_batches(rows, 2)])
    parts = [list(packed_validation_batches(rows, 2, shard=(rank, 2))) for rank in range(2)]
    assert [tokens.shape for tokens, _, _ in parts[0]] == [tokens.shape for tokens, _, _ in parts[1]]
    count = lambda batches: sum(int((targets != IGNORE).sum()) for _, targets, _ in batches)  # noqa: E731
    assert count(parts[0]) + count(parts[1]) == int((whole != IGNORE).sum()) == data.manifest.validation.answers


GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{", "t.jsonl:2: not JSON"),
        ("[]", "t.jsonl:2: a line must be a JSON object, got list"),
        ({"text": "x"}, "t.jsonl:2: a line must have 'messages', or 'prompt' and 'response'; this one has 'text'"),
        ({"prompt": "x"}, "t.jsonl:2: a line must have 'messages', or 'prompt' and 'response'"),
        ({"prompt": "x", "response": 3}, r"t.jsonl:2: message 2 \(assistant\): content must be text, got 3"),
        ({"messages": []}, "t.jsonl:2: messages must be a list of one message or more"),
        ({"messages": [{"role": "user", "content": "x"}]}, "t.jsonl:2: there is no message of the role assistant"),
        (
            {"messages": [{"role": "x", "content": ""}, {"role": "assistant", "content": ""}]},
            "t.jsonl:2: .*role must be",
        ),
        ({"prompt": "x" * 99, "response": "y"}, "t.jsonl:2: 118 tokens, more than --longest 60; shorten it, or cut or"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, wanted):
    path = write_lines(tmp_path / "t.jsonl", [GOOD, line])
    with pytest.raises(DataError, match=wanted):
        prepare(path, tmp_path / "out", tokenizer="bytes", chat=ChatOptions(longest=60), progress=False)
    assert not (tmp_path / "out").exists()


def test_long_conversations_are_cut_or_left_out_and_counted(tmp_path):
    short = [{"prompt": str(number), "response": "b"} for number in range(20)]
    long = [{"prompt": "p", "response": "y" * 90}, {"prompt": "x" * 99, "response": "y"}]
    path = write_lines(tmp_path / "t.jsonl", short + long)
    for policy, kept, counts in (("cut", 21, (2, 0, 1)), ("skip", 20, (0, 2, 0))):
        options = ChatOptions(longest=60, too_long=policy)
        manifest = prepare(path, tmp_path / policy, tokenizer="bytes", chat=options, progress=False)
        assert manifest.train.documents + manifest.validation.documents == kept
        assert (manifest.chat.cut, manifest.chat.skipped, manifest.chat.without_answer) == counts
        assert max(PreparedData(tmp_path / policy).train.lengths.max(), 0) <= 60
    assert "2 cut, 1 left out without an answer" in PreparedData(tmp_path / "cut").manifest.describe()


def test_what_prepare_and_rows_refuse(tmp_path, chat_data):
    text = tmp_path / "a.txt"
    text.write_text("x")
    for inputs, options, wanted in (
        (text, {}, "a.txt: conversations come a JSON object a line"),
        (write_lines(tmp_path / "one.jsonl", [GOOD]), {}, "there is one conversation only"),
        (tmp_path / "one.jsonl", {"template": tmp_path / "none.jinja"}, "none.jinja: cannot read the chat template"),
    ):
        with pytest.raises(DataError, match=wanted):
            prepare(inputs, tmp_path / "out", tokenizer="bytes", chat=ChatOptions(**options), progress=False)
    with pytest.raises(ConfigError, match="longest must be 2 tokens or more, got 1"):
        ChatOptions(longest=1)
    with pytest.raises(ConfigError, match="too_long must be one of refuse, cut, skip, got 'x'"):
        ChatOptions(too_long="x")
    data = PreparedData(chat_data)
    longest = int(data.train.lengths.max())
    with pytest.raises(DataError, match=f"has {longest} tokens, and sequence_length = 8 takes 9; lengthen"):
        PackedRows(data.train, data.answers("train"), 8)
    with pytest.raises(DataError, match="conversation 0 has no answer to learn from"):
        PackedRows(data.train, np.zeros(data.train.token_count, dtype=np.uint8), T)
    with pytest.raises(DataError, match=r"token .* is 256, and the model has a vocabulary of 200"):
        PackedLoader(PackedRows(data.train, data.answers("train"), T), 0, vocab_size=200).batch(0, 2)


def test_a_changed_template_or_mask_is_found(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", talks(9))
    prepare(path, tmp_path / "out", tokenizer="bytes", chat=ChatOptions(), progress=False)
    mask = tmp_path / "out/train.answers"
    content = mask.read_bytes()
    mask.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"train.answers: the manifest says"):
        PreparedData(tmp_path / "out")
    mask.write_bytes(bytes([1 - content[0]]) + content[1:])
    with pytest.raises(DataError, match=r"train.answers: damaged"):
        PreparedData(tmp_path / "out").verify()
    (tmp_path / "out/chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(DataError, match="not the chat template the data was made with"):
        PreparedData(tmp_path / "out")


# --- the model ---


def packed_and_alone(chat_data) -> tuple[tuple[torch.Tensor, ...], list[tuple[int, int, int]]]:
    """A batch of rows, and (row, start, stop) of each conversation in it."""
    data = PreparedData(chat_data)
    rows = PackedRows(data.train, data.answers("train"), T)
    batch = PackedLoader(rows, 0).batch(0, 3)
    ends = batch[2].tolist()
    places = [(start // T, start % T, stop - start // T * T) for start, stop in pairwise(ends)]
    return batch, [place for place in places if place[2] > place[1] and batch[0][place[0], place[1]] != 0]


def alone(config: GPTConfig, chat_data: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits, the sum of losses, and all gradients, of one conversation at a time."""
    batch, places = packed_and_alone(chat_data)
    assert len(places) > 4
    model = GPT(config, seed=1, dtype=dtype)
    logits, loss = [], 0.0
    for row, start, stop in places:
        tokens, targets = (x[row : row + 1, start:stop] for x in batch[:2])
        logits.append(model(tokens).detach()[0])
        loss = loss + model(tokens, targets, reduction="sum")
    loss.backward()
    return [torch.cat(logits), loss.detach(), *(p.grad for p in model.parameters())]


def packed(config: GPTConfig, chat_data: Path, parallel: ParallelContext | None = None) -> list[torch.Tensor]:
    """The same of packed rows."""
    (tokens, targets, cu_seqlens), places = packed_and_alone(chat_data)
    model = GPT(config, parallel, seed=1)
    with torch.no_grad():
        found = model(tokens, cu_seqlens=cu_seqlens)
    loss = model(tokens, targets, cu_seqlens=cu_seqlens, reduction="sum")
    loss.backward()
    finish_gradients(model.parameters())
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return [torch.cat([found[row, start:stop] for row, start, stop in places]), loss.detach(), *gradients]


def packed_on_two_ranks(config: GPTConfig, chat_data: Path, sequence_parallel: bool) -> list[torch.Tensor]:
    return packed(config, chat_data, ParallelContext.create(tp=2, sequence_parallel=sequence_parallel))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_packed_is_each_conversation_alone(ranks, chat_data, positions):
    """Logits, loss, gradients against float64 runs of one conversation at a time, also under tp = 2; and a window."""
    config = dataclasses.replace(MODEL, positions=positions, window=9 if positions == "learned" else None)
    wide, same = (alone(config, chat_data, dtype) for dtype in (torch.float64, torch.float32))
    found = [packed(config, chat_data)]
    for sequence_parallel in (False, True):
        found.append(ranks.run(packed_on_two_ranks, 2, config, chat_data, sequence_parallel)[1])
    for each in found:
        for ours, reference, plain in zip(each, wide, same, strict=True):
            assert_close_to_ref(ours, reference, plain)


def test_dropout_of_packed_rows_does_not_depend_on_their_neighbours(chat_data):
    batch, _ = packed_and_alone(chat_data)
    tokens, targets, ends = batch
    model = GPT(dataclasses.replace(MODEL, dropout=0.3), seed=1)
    n = (len(ends) - 1) // 3
    whole = model(tokens, targets, cu_seqlens=ends, reduction="none", dropout_key=DropoutKey(1, 2, 4))
    for row in range(3):
        own = ends[row * n : (row + 1) * n + 1] - row * T
        alone = model(
            tokens[row, None],
            targets[row, None],
            cu_seqlens=own.contiguous(),
            reduction="none",
            dropout_key=DropoutKey(1, 2, 4 + row),
        )
        torch.testing.assert_close(whole.view(3, T)[row], alone.view(T), rtol=1e-5, atol=1e-6)


def test_recomputation_gives_the_same_gradients(chat_data):
    batch, _ = packed_and_alone(chat_data)

    def gradients(**how):
        model = GPT(MODEL, seed=1, **how)
        model(*batch[:2], cu_seqlens=batch[2]).backward()
        return [p.grad for p in model.parameters()]

    for how in ({"recompute": "full"}, {"recompute": "selective", "recompute_modules": ("attention", "mlp", "norm")}):
        for ours, wanted in zip(gradients(**how), gradients(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def test_documents_that_the_model_refuses():
    model = GPT(MODEL)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    for ends, wanted in (
        (torch.tensor([0, 3, 8, 16], dtype=torch.int32), r"must be \(n B \+ 1,\) int32, n documents for each of B = 2"),
        (torch.tensor([0, 8, 16]), r"int32, .* got \(3,\) torch.int64"),
        (torch.tensor([0, 3, 7, 12, 16], dtype=torch.int32), "must start where each row of T = 8 does, got"),
    ):
        with pytest.raises(ValueError, match=wanted):
            model(tokens, cu_seqlens=ends)


# --- training ---


def config_of(data: Path, **train):
    return runs.config_of(data, dataclasses.replace(MODEL, dropout=0.1), **train)


def test_loss_is_the_mean_over_the_answers_of_the_whole_batch(chat_data, tmp_path):
    """Micro-batches have different numbers of answers; each answer token weighs the same."""
    data = PreparedData(chat_data)
    losses = {}
    for micro in (1, 4):
        config = runs.config_of(chat_data, MODEL, steps=1, micro_batch=micro)
        trainer = runs.train(tmp_path / f"run{micro}", config)
        losses[micro] = runs.losses(trainer.run)[0]
    rows = PackedRows(data.train, data.answers("train"), T)
    tokens, targets, ends = PackedLoader(rows, config.train.seed).batch(0, 4)
    model = GPT(MODEL, seed=config.train.seed, dtype=torch.float64)
    each = model(tokens, targets, cu_seqlens=ends, reduction="none")
    wanted = float(each.detach().sum() / (targets != IGNORE).sum())
    assert losses == {1: pytest.approx(wanted, rel=1e-6), 4: pytest.approx(wanted, rel=1e-6)}
    assert (trainer.run / "chat_template.jinja").read_text() == ChatTemplate().source
    assert ChatTemplate.load(trainer.run).special_tokens == {"eos_token": EOD}
    assert (trainer.run / "generation.json").exists()


def test_resume_with_conversations_is_exact(chat_data, tmp_path):
    """From the checkpoint of each other step of 6, with dropout, over an epoch's end: the same losses and bits."""
    config = config_of(chat_data, batch=6)
    whole = runs.train(tmp_path / "whole", config)
    assert whole.samples > len(whole.loader.rows)
    saved = runs.digests(tmp_path / "whole")
    for step in (1, 4):
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", run, ignore=lambda _, names: {"ckpt", "metrics.jsonl"} & set(names))
        shutil.copytree(tmp_path / f"whole/ckpt/step-{step:08d}", run / f"ckpt/step-{step:08d}")
        runs.train(run, config)
        assert runs.digests(run).items() <= saved.items() and len(runs.digests(run)) == 7 - step
        assert runs.losses(run).items() <= runs.losses(tmp_path / "whole").items()


def train_in_layout(folder: Path, data: Path, tp: int, sequence_parallel: bool) -> tuple[dict[int, float], float]:
    parallel = ParallelContext.create(tp=tp, sequence_parallel=sequence_parallel)
    run = folder / f"tp{tp}-{sequence_parallel}"
    trainer = runs.train(run, config_of(data, save_every=0, steps=2), parallel)
    return runs.losses(run), evaluate(trainer.model, trainer.data, 1, trainer.device, parallel=parallel)


def test_every_layout_trains_the_same(ranks, chat_data, tmp_path):
    """tp = 2, with sequence parallelism, dp = 2, and one process: losses of two steps with dropout, and held out."""
    alone = runs.train(tmp_path / "alone", config_of(chat_data, save_every=0, steps=2))
    wanted = runs.losses(alone.run)
    held_out = evaluate(alone.model, alone.data, 1, alone.device)
    for layout in ((2, False), (2, True), (1, False)):
        (found, other), _ = ranks.run(train_in_layout, 2, tmp_path, chat_data, *layout)
        assert found == pytest.approx(wanted, rel=2e-6), layout
        assert other == pytest.approx(held_out, rel=2e-6), layout


def test_options_of_prepare_for_conversations_alone(tmp_path, capsys):
    path = write_lines(tmp_path / "t.jsonl", [GOOD])
    assert main(["prepare", str(path), "--out", str(tmp_path / "out"), "--longest", "9", "--too-long", "cut"]) == 2
    assert "--longest, --too-long: for conversations; add --chat" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--stride", "3"]) == 2
    assert "eval: --stride is for --text" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--text", str(path), "--answers", "3"]) == 2
    assert "eval: --text is read alone, without --answers" in capsys.readouterr().err


def test_answers_that_are_right_are_counted(chat_data, tmp_path):
    """Of a model that has learned its few held-out conversations by heart, and of one that has not."""
    trainer = runs.train(tmp_path / "run", runs.config_of(chat_data, MODEL, steps=1))
    loaded = load_run(trainer.run)
    data = PreparedData(chat_data)
    first = answer_held_out(loaded, data, 5)
    assert len(first) == 5 and all(
        each.wanted[-1] == 256 and len(each.found) <= len(each.wanted) + 20 for each in first
    )
    mask = data.answers("validation")
    assert sum(len(each.wanted) for each in answer_held_out(loaded, data, 10**6)) == int(mask.sum())
    for each in first:  # what it says is what greedy decoding by hand says
        ids = list(each.before)
        for token in each.found:
            with torch.no_grad():
                assert int(loaded.model(torch.tensor([ids]))[0, -1].argmax()) == token
            ids.append(token)
    right = [dataclasses.replace(each, found=each.wanted) for each in first[:3]] + [
        dataclasses.replace(first[3], found=[65])
    ]
    assert describe(right, loaded.tokenizer).startswith("3 of 4 right word for word (0.750); not ")
