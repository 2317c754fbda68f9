"""Tokenizers: exact round trips, determinism, streaming, and what is refused. No device needed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megakern.config import ConfigError
from megakern.data.files import DataError
from megakern.data.tokenizer import EOD, JsonTokenizer, Tokenizer, cut, train_bpe

SOURCE = Path(json.__file__).parent
TEXTS = [path.read_text() for path in sorted(SOURCE.glob("*.py"))]
AWKWARD = [
    "",
    "\n",
    "a\r\n\tb  \n\n   c",
    "żółć 数学 👩‍🚀",
    "x" * 3000,
    "12345.678",
    f"a{EOD}b",
    "\ufeff\x00\x7f",
    "e\u0301",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 600)


@pytest.fixture(scope="module")
def both(bpe):
    return {"bytes": Tokenizer.load("bytes"), "bpe": bpe}


def sentencepiece_like(**extra):
    """As Llama's: a mark for spaces, single bytes for what the vocabulary lacks, and "</s>"."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    library = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return {**json.loads(library.to_str()), **extra}


def test_bytes_are_bytes():
    tokenizer = Tokenizer.load("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.eod_token) == (257, 256, "<|endoftext|>")
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10] and tokenizer.decode([0xC3, 0xA9, 256]) == "é<|endoftext|>"
    assert tokenizer.encode(f"a{EOD}b", allow_special=True) == [97, 256, 98]
    # Checkpoints and data name tokenizers by this hash: it must never change.
    assert (
        tokenizer.sha256
        == hashlib.sha256(b'{"eod":"<|endoftext|>","kind":"bytes","megakern_tokenizer":1,"vocab_size":257}').hexdigest()
    )


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(both, name, text):
    tokenizer = both[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids, "text must not be able to end a document"
    assert tokenizer.encode_batch([text, "next"]) == [ids, tokenizer.encode("next")]


@settings(deadline=None, max_examples=100)
@given(text=ANY_TEXT)
def test_any_text_comes_back(both, text):
    for tokenizer in both.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_only_when_asked(bpe):
    assert bpe.encode(f"a{EOD}", allow_special=True) == [*bpe.encode("a"), bpe.eod]
    assert bpe.encode(EOD) != [bpe.eod], "the flag of one call must not reach the next"


def test_the_pattern_cuts_as_its_comment_says(bpe):
    splitter = tokenizers.Tokenizer.from_str(json.dumps(bpe.content())).pre_tokenizer
    text = "def f_x(a):\n        return 42 + a.bc\n"
    pieces = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
    assert pieces == ["def", " f", "_x", "(a", "):\n       ", " return", " ", "4", "2", " +", " a", ".bc", "\n"]


def test_training_learns_the_merge_that_counts_say():
    """By hand: in "ab" x 3, "abc" the most frequent pair is (a, b), 4 times; then (ab, c)."""
    tokenizer = train_bpe(["ab ", "ab ", "ab ", "abc "], 259)
    assert tokenizer.content()["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert tokenizer.vocab_size == 259 and tokenizer.eod == 0
    assert tokenizer.encode("abc") == [258] and tokenizer.token_bytes(258) == b"abc"


def test_training_depends_on_neither_order_nor_threads(bpe):
    assert train_bpe(TEXTS[::-1], 600).sha256 == bpe.sha256
    code = "import tests.test_tokenizer as t; print(t.train_bpe(t.TEXTS, 600).sha256)"
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == bpe.sha256


def test_little_text_gives_a_smaller_vocabulary():
    assert train_bpe(["aa"], 4096).vocab_size == 258


@pytest.mark.parametrize("size", [1, 7, 50])
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("aZ9_.:é \n\r\t\u3000"), max_size=120))
def test_cutting_long_text_changes_no_id(bpe, size, text):
    library = tokenizers.Tokenizer.from_str(json.dumps(bpe.content()))
    whole = library.encode(text).ids
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in library.encode(piece).ids] == whole


def test_long_text_is_cut_and_joined(bpe, monkeypatch):
    texts = [*TEXTS, "short", ""]
    whole = [bpe.encode(text) for text in texts]
    monkeypatch.setattr("megakern.data.tokenizer._PIECE", 200)
    monkeypatch.setattr("megakern.data.tokenizer.cut", lambda text: cut(text, 200))
    assert bpe.encode_batch(texts) == whole


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_save_and_load(both, name, tmp_path):
    both[name].save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.sha256 == both[name].sha256 and type(loaded) is type(both[name])
    assert loaded.encode(TEXTS[0]) == both[name].encode(TEXTS[0])
    assert os.listdir(tmp_path) == ["t.json"]


def test_saved_file_is_one_of_the_library_and_its_layout_does_not_count(bpe, tmp_path):
    bpe.save(tmp_path / "t.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert library.encode(TEXTS[0]).ids == bpe.encode(TEXTS[0])
    library.save(str(tmp_path / "t.json"), pretty=False)
    assert Tokenizer.load(tmp_path / "t.json").sha256 == bpe.sha256


def test_foreign_tokenizer_with_truncation_padding_and_named_token(tmp_path):
    table = sentencepiece_like(
        truncation={"max_length": 2, "direction": "Right", "strategy": "LongestFirst", "stride": 0},
        padding={
            **{"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
        },
    )
    (tmp_path / "t.json").write_text(json.dumps(table))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert (tokenizer.eod_token, tokenizer.eod, tokenizer.vocab_size) == ("</s>", 2, 263)
    assert tokenizer.encode("a b a b") == [262, 259, 261, 262, 259, 261]
    assert tokenizer.decode(tokenizer.encode("a é")) == "a é"

    named = Tokenizer.load(tmp_path / "t.json", eod="<s>")
    named.save(tmp_path / "named.json")
    again = Tokenizer.load(tmp_path / "named.json")
    assert (again.eod_token, again.eod) == ("<s>", 1) and again.sha256 == named.sha256 != tokenizer.sha256
    assert again.encode("a b") == tokenizer.encode("a b")


def stream(tokenizer, ids):
    decoder = tokenizer.stream_decoder()
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@settings(deadline=None, max_examples=100)
@given(text=ANY_TEXT)
def test_streaming_text_shows_whole_characters_only(both, text):
    for tokenizer in both.values():
        parts = stream(tokenizer, tokenizer.encode(text))
        assert "".join(parts) == text
        assert "\ufffd" in text or all("\ufffd" not in part for part in parts)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_streaming_any_ids_equals_decode(both, data):
    for tokenizer in both.values():
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab é👩"), max_size=20))
def test_streaming_a_tokenizer_whose_tokens_are_not_bytes(text):
    tokenizer = JsonTokenizer(sentencepiece_like())
    assert tokenizer.token_bytes(5) is None
    parts = stream(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == tokenizer.decode(tokenizer.encode(text))
    assert all("\ufffd" not in part for part in parts)


def test_streaming_bytes_that_are_not_utf8_does_not_wait_for_ever():
    tokenizer = JsonTokenizer(sentencepiece_like())
    parts = stream(tokenizer, [3 + 0xFF] * 20 + [3 + 0xC3])
    assert parts.index(next(filter(None, parts))) < 8
    assert stream(tokenizer, [260, 3 + 0xC3])[-1] == "\ufffd"
    assert stream(Tokenizer.load("bytes"), [0xC3])[-1] == "\ufffd"


def test_a_stream_decoder_can_be_used_again():
    decoder = Tokenizer.load("bytes").stream_decoder()
    decoder.push(0xC3)
    decoder.finish()
    assert decoder.push(0xA9) == "\ufffd" and decoder.push(97) == "a"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"t\.json: cannot read the tokenizer, No such file"),
        ("{", r"t\.json: not a tokenizer file, it must be JSON: Expecting"),
        ("\xff", r"t\.json: not a tokenizer file, it must be JSON"),
        ("[1]", "it must hold a JSON object, got list"),
        ("{}", "not a file of the tokenizers library: Model missing"),
        ('{"megakern_tokenizer": 2}', "of a form this version does not know"),
        ('{"megakern_tokenizer": 1, "eod": 5, "tokenizer": {}}', "of a form this version does not know"),
        ('{"megakern_tokenizer": 1, "kind": "bytes", "vocab_size": 300}', "of a form this version does not know"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path / "t.json")


def test_a_tokenizer_needs_an_end_of_document_token(tmp_path):
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[end]": 1}, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "t.json"))
    with pytest.raises(
        DataError, match=r"t\.json: .* does not have an end-of-document token \(<\|endoftext\|>, .*eod="
    ):
        Tokenizer.load(tmp_path / "t.json")
    with pytest.raises(DataError, match=r"does not have the token '\[fin\]'"):
        Tokenizer.load(tmp_path / "t.json", eod="[fin]")
    assert Tokenizer.load(tmp_path / "t.json", eod="[end]").eod == 1


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_wrong_ids_and_text_are_named(both, name):
    tokenizer = both[name]
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=f"token id {wrong} is out of range, the tokenizer has"):
            tokenizer.decode([5, wrong])
        with pytest.raises(DataError, match=f"token id {wrong} is out of range"):
            tokenizer.stream_decoder().push(wrong)
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(DataError, match=r"the lone surrogate '\\ud800' at character 2"):
            call("ab\ud800")


def test_options_out_of_range():
    with pytest.raises(ConfigError, match="vocab_size must be 257 or more for a byte-level BPE, got 256"):
        train_bpe(["a"], 256)
    with pytest.raises(ConfigError, match="'bytes' has the end-of-document token"):
        Tokenizer.load("bytes", eod="</s>")
