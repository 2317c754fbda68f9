"""Which documents come out of files and folders, and what is said of bad ones. No device needed."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from megakern.data import documents as module
from megakern.data.documents import Documents
from megakern.data.files import DataError


def tree(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(*inputs, **options):
    return list(Documents(inputs, **options).read())


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_a_folder_is_read_sorted_without_hidden_files(tmp_path):
    tree(tmp_path, b_dot_txt="2", a__z_dot_txt="1", c__d__e_dot_py="4", c__a_dot_txt="3", _dot_git__x="no", _dot_h="no")
    assert read(tmp_path) == ["1", "2", "3", "4"]
    assert read(str(tmp_path), include=["*.py"]) == ["4"]
    assert read(tmp_path, include=["c/*.txt", "b*"]) == ["2", "3"]
    assert read(tmp_path, exclude=["d", "a"]) == ["2", "3"]
    assert read(tmp_path, exclude=["c/d/*"]) == ["1", "2", "3"]
    assert read(tmp_path, leave_out=tmp_path / "c") == ["1", "2"]
    assert read(tmp_path / "c", tmp_path / "b.txt", include=["*.py"]) == ["4", "2"], "patterns are for folders only"


def test_links_are_followed_and_loops_end(tmp_path):
    tree(tmp_path, a__x_dot_txt="1", b__y_dot_txt="2")
    os.symlink(tmp_path / "a", tmp_path / "a" / "loop")
    os.symlink(tmp_path / "b", tmp_path / "a" / "other")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    os.symlink(tmp_path / "self", tmp_path / "self")
    os.mkfifo(tmp_path / "pipe")
    found = Documents([tmp_path])
    assert list(found.read()) == ["2", "1"], "a/other comes before a/x.txt, and b is not read again"
    assert found.skipped == {"empty": 0, "undecodable": 0, "unreadable": 3}
    assert found.examples == [str(tmp_path / name) for name in ("broken", "pipe", "self")]
    with pytest.raises(DataError, match=r"broken: cannot be read; mend or exclude it"):
        read(tmp_path, strict=True)


def test_json_lines_plain_and_packed(tmp_path):
    rows = lines({"text": "one\n", "id": 1}, "", {"text": "  "}, {"text": "dé"})
    tree(tmp_path, a_dot_jsonl=b"\xef\xbb\xbf" + rows.encode(), b_dot_jsonl_dot_gz=gzip.compress(rows.encode()))
    found = Documents([tmp_path])
    assert list(found.read()) == ["one\n", "dé"] * 2
    assert found.skipped["empty"] == 2
    tree(tmp_path, c__x_dot_jsonl=lines({"body": "b"}) + '{"body": "no line end"}')
    assert read(tmp_path / "c", text_key="body") == ["b", "no line end"]


def test_text_is_kept_as_it_is(tmp_path):
    assert read(tree(tmp_path, a=b"\xef\xbb\xbfa\r\nb\x00\n", b=" \n\t")) == ["a\r\nb\x00\n"]


def test_what_is_not_utf8_is_counted_or_raised(tmp_path):
    tree(tmp_path, a=b"\xff\xfe", b="good", c_dot_jsonl=lines({"text": "x"}).encode() + b'{"text": "\xff"}\n')
    tree(tmp_path, d_dot_jsonl='{"text": "\\ud800"}')
    found = Documents([tmp_path])
    assert list(found.read()) == ["good", "x"]
    assert found.skipped == {"empty": 0, "undecodable": 3, "unreadable": 0}
    assert found.examples == [f"{tmp_path}/a", f"{tmp_path}/c.jsonl:2", f"{tmp_path}/d.jsonl:1"]
    with pytest.raises(DataError, match=r"/a: not UTF-8; mend or exclude it, or prepare without strict"):
        read(tmp_path, strict=True)
    with pytest.raises(DataError, match=r"c\.jsonl:2: not UTF-8"):
        read(tmp_path, exclude=["a"], strict=True)


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"text": ', r"x\.jsonl:2: not JSON: Expecting value"),
        ("[" * 200_000, r"x\.jsonl:2: not JSON: "),
        ("[1]", r"x\.jsonl:2: a line must be a JSON object, got list"),
        ('{"body": "b", "id": 1}', r"x\.jsonl:2: no key 'text', the line has 'body', 'id'; name the key of the text"),
        ("{}", r"x\.jsonl:2: no key 'text', the line has none"),
        ('{"text": 5}', r"x\.jsonl:2: 'text' must be text, got int"),
    ],
)
def test_bad_lines_are_named(tmp_path, bad, message):
    with pytest.raises(DataError, match=message):
        read(tree(tmp_path, x_dot_jsonl=lines({"text": "ok"}) + bad))


@pytest.mark.parametrize("damage", [lambda z: z[:-12], lambda z: b"no" + z, lambda z: z[:40] + b"\xff" * 20 + z[60:]])
def test_damaged_gz_is_named(tmp_path, damage):
    packed = gzip.compress(lines(*({"text": os.urandom(50).hex()} for _ in range(20))).encode())
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: cannot be unpacked after line \d+: "):
        read(tree(tmp_path, x_dot_jsonl_dot_gz=damage(packed)))


def test_missing_inputs_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such file or folder"):
        Documents([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no files that match \*\.py were found; check the path"):
        Documents([tree(tmp_path, a="1")], include=["*.py"])
    with pytest.raises(DataError, match="no inputs: no files were found"):
        Documents([])


def test_a_file_that_vanishes_is_named_or_counted(tmp_path):
    tree(tmp_path, a="1", b="2")
    by_name, by_folder = Documents([tmp_path / "a"]), Documents([tmp_path])
    (tmp_path / "a").unlink()
    with pytest.raises(DataError, match="/a: cannot be read: No such file"):
        list(by_name.read())
    assert list(by_folder.read()) == ["2"] and by_folder.skipped["unreadable"] == 1


def test_documents_above_the_limit_are_refused(tmp_path, monkeypatch):
    tree(tmp_path, a="x" * 11, b_dot_jsonl=lines({"text": "x" * 11}))
    monkeypatch.setattr(module, "LONGEST", 10)
    for name in ("a", "b.jsonl"):
        with pytest.raises(DataError, match=f"{name}.*: the document is longer than .* cut it into several"):
            read(tmp_path / name)


def test_reading_is_lazy_and_reports_every_byte(tmp_path):
    tree(tmp_path, a_dot_jsonl=lines(*({"text": f"{i}" * 1000} for i in range(2000))), b="text")
    found = Documents([tmp_path])
    told = []
    reader = found.read(told.append)
    assert next(reader) == "0" * 1000
    assert sum(told) < 10_000, "one line must not need the whole file"
    list(reader)
    assert sum(told) == found.size == sum(path.stat().st_size for path in tmp_path.iterdir())
