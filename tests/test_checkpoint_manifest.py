"""Manifests from strangers, with the right hash inside; tilings; nothing in the package runs what a file says. 5 s."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import megakern
from megakern.train import checkpoint, manifest
from megakern.train.checkpoint import CheckpointError
from tests.checkpoints import ONE, blank, sample, save_sample

NAME = "manifest.json"


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_sample(tmp_path, 2, seed=2)


def signed(table: dict) -> bytes:
    """Canonical JSON with its hash, written down here a second time."""
    table = {key: value for key, value in table.items() if key != "sha256"}
    text = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    text = json.dumps({**table, "sha256": hashlib.sha256(text).hexdigest()}, sort_keys=True, separators=(",", ":"))
    return text.encode() + b"\n"


def changed(saved: Path, change) -> None:
    table = json.loads((saved / NAME).read_bytes())
    change(table)
    (saved / NAME).write_bytes(signed(table))


def table_of(step: int = 1) -> dict:
    """A small sound manifest: one tensor of (4, 6) in two pieces."""
    pieces = [{"file": "a.safetensors", "offsets": [0, c], "shape": [4, 3], "crc32": 0} for c in (0, 3)]
    return {
        **{"schema": 1, "step": step, "sequence": 1, "time": "2026-01-01T00:00:00+00:00", "state": {}, "threads": 1},
        **{"layout": {"tp": 1}, "libraries": {"torch": "2"}},
        "files": {"a.safetensors": {"size": 96, "sha256": "0" * 64}},
        "tensors": {"w": {"dtype": "float32", "shape": [4, 6], "pieces": pieces}},
    }


def test_the_sound_table_is_sound():
    assert manifest.parse(signed(table_of()), "x").tensors["w"].shape == (4, 6)


def place(table: dict, path: tuple, value) -> dict:
    *way, last = path
    inner = table
    for key in way:
        inner = inner[key]
    inner[last] = value
    return table


PIECE = ("tensors", "w", "pieces", 0)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("schema",), 2, "has schema 2, this megakern reads up to 1; use a newer megakern"),
        (("schema",), 0, "schema must be 1, got 0"),
        (("surprise",), 1, "its keys must be"),
        (("step",), -1, "step must be a whole number"),
        (("step",), True, "step must be a whole number"),
        (("step",), 1.0, "step must be a whole number"),
        (("sequence",), 2**63, "sequence must be a whole number"),
        (("threads",), "1", "threads must be a whole number"),
        (("time",), "yesterday", "time must be an ISO 8601 time"),
        (("time",), 5, "time must be an ISO 8601 time"),
        (("state",), [], "state must be an object, got list"),
        (("layout", "tp"), "2", "layout.tp must be a whole number"),
        (("libraries", "torch"), 2, "libraries.torch must be a short text"),
        (("files",), {}, "a piece of w is in 'a.safetensors', not a file of it"),
        (("files", "b.safetensors"), {"size": 1, "sha256": "0" * 64}, r"no tensor uses \['b\.safetensors'\]"),
        (("files", "a.safetensors", "size"), 95, "pieces of 96 bytes cannot be in a.safetensors of 95 bytes"),
        (("files", "a.safetensors", "sha256"), "0" * 63, "cannot be the sha256 of a.safetensors"),
        (("files", "a.safetensors"), {"size": 96}, "file a.safetensors must have size and sha256"),
        (("tensors", "w", "dtype"), "object", "w has dtype 'object'; known: float64"),
        (("tensors", "w", "shape"), [4, 7], "w: its pieces have 24 elements, the tensor has 28"),
        (("tensors", "w", "shape"), [2**40, 2**40], "has too many elements"),
        (("tensors", "w", "shape"), [4] * 65, "a list of at most 64"),
        (("tensors", "w", "shape"), [-4, 6], "shape of w must be a whole number"),
        (("tensors", "w", "pieces"), {}, "pieces of w must be a list"),
        (("tensors", "w"), {}, "w must have dtype, shape and pieces"),
        (PIECE, {}, "a piece of w must have file, offsets, shape and crc32"),
        ((*PIECE, "file"), "c.safetensors", "is in 'c.safetensors', not a file of it"),
        ((*PIECE, "file"), ["a"], "not a file of it"),
        ((*PIECE, "crc32"), 2**32, "crc32 of a piece of w must be a whole number"),
        ((*PIECE, "offsets"), [0, 1], "pieces at .* overlap"),
        ((*PIECE, "offsets"), [0, 4], "is out of"),
        ((*PIECE, "offsets"), [0], "another number of dims"),
        ((*PIECE, "shape"), [0, 3], "is empty"),
    ],
)
def test_each_check_of_the_manifest(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        manifest.parse(signed(place(table_of(), path, value)), "x")


BAD_NAME = st.one_of(
    st.sampled_from(
        ["..", "../x", "/etc/passwd", "C:\\x", "a/../../b", "a\0", "~/x", "\\\\host\\x", "a\n", ".hidden", ""]
    ),
    st.text(max_size=8),
).flatmap(lambda text: st.sampled_from([text, f"{text}.safetensors", f"{text}/a.safetensors", f"a/{text}.safetensors"]))


@given(BAD_NAME)
def test_no_file_name_leaves_the_folder(name):
    table = table_of()
    table["files"] = {name: table["files"]["a.safetensors"]}
    for piece in table["tensors"]["w"]["pieces"]:
        piece["file"] = name
    folder = Path("/run/ckpt")
    try:
        files = manifest.parse(signed(table), "x").files
    except CheckpointError as error:
        assert "cannot be a file name" in str(error)
    else:
        assert [Path(os.path.normpath(folder / file)).parent for file in files] == [folder]
        assert not any(set(file) & set("/\\:\0 ") for file in files)


@given(st.text(max_size=6))
def test_no_tensor_name_is_taken_for_another(name):
    table = table_of()
    table["tensors"] = {name: table["tensors"]["w"]}
    try:
        manifest.parse(signed(table), "x")
    except CheckpointError as error:
        assert "cannot be a tensor name" in str(error)
    else:
        assert name and name.isascii() and name.isprintable() and not set(name) & set("[]/\\: ")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)
PATHS = [
    *[(key,) for key in table_of()],
    *[("files", "a.safetensors"), ("files", "a.safetensors", "size"), ("tensors", "w"), PIECE],
    *[("tensors", "w", key) for key in ("dtype", "shape", "pieces")],
    *[(*PIECE, key) for key in ("file", "offsets", "shape", "crc32")],
]


@settings(max_examples=300)
@given(st.sampled_from(PATHS), JSON)
@example(("schema",), True)  # equal to 1, and another text
@example(("schema",), 1.0)
def test_any_value_anywhere_is_read_or_refused(path, value):
    """Never another exception than CheckpointError, and what is read is what would be written."""
    raw = signed(place(table_of(), path, value))
    try:
        read = manifest.parse(raw, "x")
    except CheckpointError:
        return
    assert manifest.render(read) == raw


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 10**5, b'{"sha256":1}', b"1" * 5000, b"NaN"])
def test_what_is_no_manifest(raw):
    with pytest.raises(CheckpointError, match="x is damaged"):
        manifest.parse(raw, "x")


def test_a_huge_manifest_is_not_read(saved):
    os.truncate(saved / NAME, manifest.MAX_BYTES + 1)  # a hole: takes no space
    with pytest.raises(CheckpointError, match="more than the 268435456 a manifest may have"):
        checkpoint.read_manifest(saved)


def test_a_manifest_that_contradicts_the_header_is_refused(saved):
    def transpose(table):
        entry = table["tensors"]["model.w"]
        entry["shape"] = entry["pieces"][0]["shape"] = [8, 6]

    changed(saved, transpose)
    into = blank(sample(0)) | {"model.w": torch.zeros(8, 6)}
    with pytest.raises(CheckpointError, match=r"model\.w is F32 \[6, 8\], the manifest says float32 \[8, 6\]"):
        checkpoint.load(saved, into, ONE)


def test_a_manifest_that_names_a_tensor_no_file_holds(saved):
    def rename(table):
        table["tensors"]["model.other"] = table["tensors"].pop("model.w")

    changed(saved, rename)
    into = blank(sample(0))
    into["model.other"] = into.pop("model.w")
    with pytest.raises(CheckpointError, match=r"File does not contain tensor model\.other"):
        checkpoint.load(saved, into, ONE)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 3), max_size=3),
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=3), st.lists(st.integers(0, 3), max_size=3)), max_size=5),
    st.randoms(use_true_random=False),
)
def test_tiling_against_counting(shape, pieces, chance):
    """`tiling_fault` says what counting the visits of each element says; half of the cases are true tilings."""
    if chance.random() < 0.5:
        pieces = split(tuple(0 for _ in shape), tuple(shape), chance)
    count = np.zeros(shape, dtype=int)
    right = True
    for offsets, size in pieces:
        fits = len(offsets) == len(shape) == len(size) and 0 not in size
        if not fits or any(o + s > n for o, s, n in zip(offsets, size, shape, strict=True)):
            right = False
        else:
            count[tuple(slice(o, o + s) for o, s in zip(offsets, size, strict=True))] += 1
    right = right and bool((count == 1).all())
    assert (manifest.tiling_fault(shape, pieces) is None) == right


def split(offsets: tuple, shape: tuple, chance) -> list:
    dims = [d for d, size in enumerate(shape) if size > 1]
    if not dims or chance.random() < 0.3:
        return [(offsets, shape)]
    dim = chance.choice(dims)
    cut = chance.randint(1, shape[dim] - 1)
    low = tuple(cut if d == dim else size for d, size in enumerate(shape))
    high = tuple(size - cut if d == dim else size for d, size in enumerate(shape))
    shifted = tuple(offset + cut if d == dim else offset for d, offset in enumerate(offsets))
    return split(offsets, low, chance) + split(shifted, high, chance)


# --- nothing in the package runs what a file says ---

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "torch.serialization.load"}
KEYWORDS = {"allow_pickle", "trust_remote_code"}


def unsafe(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
            found += [name for alias in node.names if (name := f"{node.module}.{alias.name}") in CALLS]
        elif isinstance(node, ast.Call):
            found += [name for name in [ast.unparse(node.func)] if name in CALLS]
            found += [keyword.arg for keyword in node.keywords if keyword.arg in KEYWORDS]
    return found


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import os, dill", "eval('1')", "exec(x)", "torch.load(x)"),
        *("from torch import load", "yaml.load(f)", "np.load(f, allow_pickle=True)", "f(trust_remote_code=True)"),
    ],
)
def test_the_search_finds(source):
    assert unsafe(source)
    assert not unsafe("model.eval(); re.compile('x'); json.load(f)  # eval(, pickle")


def test_the_package_runs_nothing_from_files():
    paths = sorted(Path(megakern.__file__).parent.rglob("*.py"))
    assert len(paths) > 20
    found = {str(path.relative_to(paths[0].parent)): found for path in paths if (found := unsafe(path.read_text()))}
    # nanoGPT's checkpoints have no other form: one call, which makes nothing but tensors, numbers and containers.
    assert found == {"convert/foreign.py": ["torch.load"]}
    tree = ast.parse((paths[0].parent / "convert/foreign.py").read_text())
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call for call in calls if call.startswith("torch.load(")]
    assert len(calls) == 1 and "weights_only=True" in calls[0]
