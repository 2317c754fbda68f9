"""Preparing data end to end, twice the same, and never half. No device needed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megakern.config import ConfigError
from megakern.data import prepare as module
from megakern.data import progress
from megakern.data.files import DataError
from megakern.data.manifest import PreparedData
from megakern.data.prepare import prepare
from megakern.data.tokenizer import train_bpe

FILES = ["manifest.json", "tokenizer.json", "train.bin", "train.idx", "validation.bin", "validation.idx"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for i in range(40):
        (folder / ("sub" if i % 2 else "") / f"{i:02d}.py").write_text(
            f"def f{i}(x):\n    return x * {i}\n" * (1 + i % 5)
        )
    (folder / "copy.py").write_text((folder / "00.py").read_text())
    (folder / "empty.py").write_text("\n")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    return folder


def run(inputs, out, **options):
    return prepare(inputs, out, **{"tokenizer": "bytes", "validation_fraction": 0.25, "progress": False, **options})


def texts(dataset, tokenizer):
    rows = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(row[-1] == tokenizer.eod and tokenizer.eod not in row[:-1] for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_every_document_comes_back_once(corpus, tmp_path, tokenizer):
    manifest = run(corpus, tmp_path / "out", tokenizer=tokenizer, vocab_size=300)
    data = PreparedData(tmp_path / "out")
    data.verify()
    assert sorted(os.listdir(tmp_path / "out")) == FILES and data.manifest == manifest
    train, validation = texts(data.train, data.tokenizer), texts(data.validation, data.tokenizer)
    wanted = {path.read_text() for path in corpus.rglob("[0-9]*.py")}
    assert len(train) + len(validation) == len(wanted) == 40 and set(train) | set(validation) == wanted
    assert 3 <= len(validation) <= 17, "a quarter of 40, within three standard deviations"
    for split, rows, dataset in (("train", train, data.train), ("validation", validation, data.validation)):
        info = getattr(manifest, split)
        assert (info.documents, info.tokens) == (len(rows), dataset.token_count)
        assert info.bytes == sum(len(row.encode()) for row in rows)
        assert info.bin_sha256 == hashlib.sha256((tmp_path / f"out/{split}.bin").read_bytes()).hexdigest()
        assert info.idx_sha256 == hashlib.sha256((tmp_path / f"out/{split}.idx").read_bytes()).hexdigest()
        assert data.bytes_per_token(split) == info.bytes / info.tokens
    assert vars(manifest.skipped) == {"duplicate": 1, "empty": 1, "undecodable": 1, "unreadable": 0}
    assert manifest.dtype == "uint16" and data.train.dtype == np.uint16
    with pytest.raises(ConfigError, match="split must be one of train, validation, got 'test'"):
        data.bytes_per_token("test")


def test_the_bpe_is_trained_on_the_train_split_alone(corpus, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "train_bpe", lambda some, size: seen.extend(some) or train_bpe(seen, size))
    run(corpus, tmp_path / "out", tokenizer="train", vocab_size=280)
    data = PreparedData(tmp_path / "out")
    assert sorted(seen) == sorted(texts(data.train, data.tokenizer))
    assert data.tokenizer.sha256 == train_bpe(seen, 280).sha256


def test_the_sample_for_the_bpe_is_bounded(corpus, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "train_bpe", lambda some, size: seen.extend(some) or train_bpe(seen, size))
    run(corpus, tmp_path / "out", tokenizer="train", vocab_size=260, train_bytes_limit=300)
    assert 100 < sum(len(text) for text in seen) <= 300
    first = set(seen)
    seen.clear()
    run(corpus, tmp_path / "more", tokenizer="train", vocab_size=260, train_bytes_limit=600)
    assert first < set(seen), "documents come in the order of their hash"
    seen.clear()
    run(corpus, tmp_path / "least", tokenizer="train", vocab_size=260, train_bytes_limit=1)
    assert len(seen) == 1


def test_the_same_input_gives_the_same_bytes(corpus, tmp_path):
    for out in ("a", "b"):
        run(corpus, tmp_path / out, tokenizer="train", vocab_size=280)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "a/manifest.json").read_text()


def test_the_side_of_a_document_depends_on_its_text_and_the_seed_only(corpus, tmp_path):
    def sides(out, inputs, **options):
        run(inputs, tmp_path / out, **options)
        data = PreparedData(tmp_path / out)
        return set(texts(data.train, data.tokenizer)), set(texts(data.validation, data.tokenizer))

    train, validation = sides("all", corpus)
    rows = [json.dumps({"text": path.read_text()}) for path in sorted(corpus.rglob("*.py"), reverse=True)][:25]
    (tmp_path / "some.jsonl").write_text("\n".join(rows))
    fewer_train, fewer_validation = sides("some", tmp_path / "some.jsonl")
    assert fewer_train < train and fewer_validation < validation
    assert sides("seed", corpus, seed=1)[1] != validation
    larger = sides("larger", corpus, validation_fraction=0.5)[1]
    assert validation < larger


def test_a_side_is_never_empty(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    for fraction, wanted in ((1e-9, (2, 1)), (1 - 1e-9, (1, 2))):
        manifest = run(tmp_path, tmp_path / f"out{fraction}", validation_fraction=fraction, include=["*.txt"])
        assert (manifest.train.documents, manifest.validation.documents) == wanted
        assert manifest.held_out == "documents"


def test_the_end_of_a_single_document_is_held_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "train_bpe", lambda some, size: seen.extend(some) or train_bpe(seen, size))
    lines = [f"line {i}\n" for i in range(100)]
    (tmp_path / "x.txt").write_text("".join(lines))
    manifest = run(tmp_path / "x.txt", tmp_path / "out", tokenizer="train", vocab_size=270, validation_fraction=0.1)
    data = PreparedData(tmp_path / "out")
    train, validation = texts(data.train, data.tokenizer), texts(data.validation, data.tokenizer)
    assert manifest.held_out == "tail" and train + validation == ["".join(lines[:90]), "".join(lines[90:])]
    assert manifest.train.bytes + manifest.validation.bytes == len("".join(lines))
    assert seen == train, "the vocabulary must not know the end"
    (tmp_path / "x.txt").write_text("ab")
    assert run(tmp_path / "x.txt", tmp_path / "two").validation.bytes == 1
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(DataError, match="the only document, of 1 characters, is too short to hold out its end"):
        run(tmp_path / "x.txt", tmp_path / "one")


def test_a_tokenizer_file_and_a_large_vocabulary(corpus, tmp_path):
    table = train_bpe(["some other text"], 260).content()
    table["added_tokens"] = [{**table["added_tokens"][0], "id": 0, "content": "[end]"}]
    vocabulary = {("[end]" if id == 0 else piece): id for piece, id in table["model"]["vocab"].items()}
    table["model"]["vocab"] = vocabulary | {f"filler {i}": 300 + i for i in range(66_000)}
    (tmp_path / "t.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match="does not have an end-of-document token"):
        run(corpus, tmp_path / "out", tokenizer=tmp_path / "t.json")
    assert not (tmp_path / "out").exists()
    manifest = run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "t.json"), eod="[end]")
    data = PreparedData(tmp_path / "out")
    assert (manifest.dtype, manifest.options.tokenizer, data.tokenizer.eod_token) == ("int32", "file", "[end]")
    assert len(texts(data.train, data.tokenizer)) == manifest.train.documents


def test_refuses_to_overwrite_unless_asked(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out)
    before = {name: (out / name).read_bytes() for name in FILES}
    with pytest.raises(DataError, match=r"out: already holds train\.bin, .*manifest\.json; choose another folder, or"):
        run(corpus, out)
    (corpus / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not JSON"):
        run(corpus, out, overwrite=True)
    assert {name: (out / name).read_bytes() for name in FILES} == before and sorted(os.listdir(out)) == FILES
    (corpus / "bad.jsonl").unlink()
    run(corpus, out, overwrite=True, tokenizer="train", vocab_size=260)
    PreparedData(out).verify()


@pytest.mark.parametrize("call", range(8))
def test_a_crash_while_files_are_moved_never_leaves_a_mixed_folder(corpus, tmp_path, monkeypatch, call):
    out = tmp_path / "out"
    run(corpus, out)
    count, real = iter(range(100)), os.replace

    def replace(source, target):
        if Path(target).parent == out and next(count) == call:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if call < 6:
        with pytest.raises(KeyboardInterrupt):
            run(corpus, out, overwrite=True, seed=1)
        assert not (out / "manifest.json").exists() and not (out / ".prepare.tmp").exists()
    else:
        run(corpus, out, overwrite=True, seed=1)
        PreparedData(out).verify()


def test_a_folder_in_use_is_refused(corpus, tmp_path):
    (tmp_path / "out/.prepare.tmp").mkdir(parents=True)
    with pytest.raises(DataError, match=r"out: is being prepared \(\.prepare\.tmp exists\); if a run was killed"):
        run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    with pytest.raises(DataError, match=r"00\.py: is a file, not a folder; choose another"):
        run(corpus, corpus / "00.py")
    with pytest.raises(DataError, match="cannot make the folder: Not a directory"):
        run(corpus, corpus / "00.py/out")


def test_output_inside_the_input_is_not_read(corpus):
    first = run(corpus, corpus / "out")
    assert run(corpus, corpus / "out", overwrite=True) == first


def test_input_without_text_or_that_changes(corpus, tmp_path, monkeypatch):
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank/a").write_text(" \n")
    (tmp_path / "blank/b").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"blank/a: no text in 2 files \(1 empty, 1 undecodable\)"):
        run(tmp_path / "blank", tmp_path / "out")
    (tmp_path / "blank/a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no text in 1 files \(no lines\)"):
        run(tmp_path / "blank/a.jsonl", tmp_path / "out")
    for tokenizer, attack in (
        ("bytes", lambda: (corpus / "01.py").write_text("other")),
        ("train", lambda: (corpus / "sub/39.py").unlink()),
        ("bytes", lambda: (corpus / "empty.py").write_text("one more")),
    ):
        real = module._Plan.__init__
        (corpus / "01.py").write_text("1")
        (corpus / "empty.py").write_text("")

        def read_then_change(plan, *arguments, real=real, attack=attack):
            real(plan, *arguments)
            attack()

        monkeypatch.setattr(module._Plan, "__init__", read_then_change)
        with pytest.raises(DataError, match="the input changed while it was read; prepare it again"):
            run(corpus, tmp_path / "out", tokenizer=tokenizer, vocab_size=260)
        monkeypatch.undo()
        assert not (tmp_path / "out").exists()


def test_skipped_files_are_logged_and_strict_raises(corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(corpus, tmp_path / "out")
    assert "skipped 1 that are not UTF-8 or cannot be read, as " in caplog.text and "picture.png" in caplog.text
    with pytest.raises(DataError, match=r"picture\.png: not UTF-8"):
        run(corpus, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals_and_short_work_says_nothing_when_piped(corpus, tmp_path, monkeypatch, terminal):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    run(corpus, tmp_path / "out", tokenizer="train", vocab_size=260, progress=True)
    shown = [name for name in ("reading", "learning the vocabulary", "writing tokens") if name in screen.getvalue()]
    assert len(shown) == (3 if terminal else 0)
    assert terminal or screen.getvalue() == ""


def test_long_work_says_a_line_now_and_then_when_piped(tmp_path, monkeypatch):
    """Twenty files, on a clock that gains 8 s at each look at it."""
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / str(i)).write_text(f"some words of text {i}\n")
    screen, clock = io.StringIO(), iter(range(0, 10**6, 8))
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    run(tmp_path / "texts", tmp_path / "out", progress=True)
    lines = screen.getvalue().splitlines()
    assert lines and all(
        re.fullmatch(r"(reading|writing tokens): \d+%, (\d+:)?\d+:\d\d left", line) for line in lines
    ), lines


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_fraction": 0}, "validation_fraction must be between 0 and 1, got 0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be between 0 and 1, got 1.0"),
        ({"train_bytes_limit": 0}, "train_bytes_limit must be 1 or more, got 0"),
        ({"include": "*.py"}, r"include must be a list of patterns, got the text '\*\.py'"),
        ({"seed": -1}, r"seed must be from 0 to 2\^63 - 1, got -1"),
        ({"tokenizer": "train", "vocab_size": 100}, "vocab_size must be 257 or more, got 100"),
        ({"tokenizer": "train", "eod": "</s>"}, "eod names the token of a tokenizer file"),
    ],
)
def test_options_out_of_range(corpus, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def child(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_disk_full_is_named_and_leaves_nothing(corpus, tmp_path):
    """As a command: a failure at work (1), as that of `train`, and not wrong input (2)."""
    code = (
        "import resource, sys\nfrom megakern.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "sys.exit(main(['prepare', sys.argv[1], '--out', sys.argv[2], '--tokenizer', 'bytes']))\n"
    )
    done = child(code, corpus, tmp_path / "out")
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"megakern: .*train\.bin: File too large after [\d,]+ bytes; free some .*", last), done.stderr
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "tokenizer, suffix, few, many, allowed", [("bytes", ".jsonl.gz", 500, 6000, 4), ("train", ".jsonl", 300, 800, 24)]
)
def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, suffix, few, many, allowed):
    """Peak memory of many rows of 4 kB is that of few, and a little: 6000 rows are 24 MB, 800 encoded above 100 MB.
    Encoding has a peak that wanders: 108, 116, 124 and 121 MB with 300, 800, 2000 and 5000 rows.

    VmHWM and not ru_maxrss, which in a new process starts with the peak of its parent.
    """
    lines = [f"name_{i} = value({i})\n" for i in range(2000)]
    generator = np.random.RandomState(0)
    code = (
        "import re, sys\nfrom megakern.data.prepare import prepare\n"
        "m = prepare(*sys.argv[1:3], tokenizer=sys.argv[3], vocab_size=400, train_bytes_limit=10**5, progress=False)\n"
        "peak = re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(m.train.bytes + m.validation.bytes, int(peak) / 1024)\n"
    )
    peaks = []
    for count in (few, many):
        path = tmp_path / f"{count}{suffix}"
        with gzip.open(path, "wt", 1) if suffix.endswith("gz") else open(path, "w") as file:
            for _ in range(count):
                text = "".join(lines[i] for i in generator.randint(0, 2000, 200))
                file.write(json.dumps({"text": text}) + "\n")
        done = child(code, path, tmp_path / str(count), tokenizer)
        assert done.returncode == 0, done.stderr
        size, peak = map(float, done.stdout.split())
        assert size > count * 3900
        peaks.append(peak)
    assert peaks[1] - peaks[0] < allowed, f"MB with {few} and {many} rows: {peaks}"
