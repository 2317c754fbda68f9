"""Text streaming around generation. No device needed."""

from __future__ import annotations

import pytest

from megakern.config import ConfigError
from megakern.data.files import DataError
from megakern.data.tokenizer import Tokenizer
from megakern.inference import StopStrings, TextOf, _stop_tokens
from megakern.model.engine import Step

TEXTS = ["", "abc", "xENDy", "xENx ENDz", "aaab", "a\n\nb", "def f(): END", "EN", "aabaab"]


def streamed(text: str, size: int, stop: tuple[str, ...]) -> list[str]:
    """What comes through, without empty pieces."""
    strings, pieces = StopStrings(stop), []
    for i in range(0, len(text), size):
        pieces.append(strings.push(text[i : i + size]))
        if strings.found:
            break
    return [piece for piece in [*pieces, strings.finish()] if piece]


@pytest.mark.parametrize("word", ["END", "\n\n", "aab", "a", "def"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 99])
@pytest.mark.parametrize("text", TEXTS)
def test_one_stop_string_cuts_like_a_search_of_the_whole_text(text, size, word):
    pieces = streamed(text, size, (word,))
    assert "".join(pieces) == text.split(word)[0]


@pytest.mark.parametrize("size", [1, 2, 99])
@pytest.mark.parametrize("text", TEXTS)
def test_with_several_stop_strings_none_comes_through(text, size):
    stop = ("END", "aab", "ab")
    got = "".join(streamed(text, size, stop))
    assert text.startswith(got)
    assert not any(word in got for word in stop)
    assert got == text or any(word in text for word in stop)


def test_text_that_cannot_be_part_of_a_stop_string_is_not_held_back():
    assert streamed("hello world", 1, ("END",)) == list("hello world")
    assert streamed("hEllo", 1, ("END",)) == ["h", "El", "l", "o"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="a stop string must not be empty"):
        StopStrings(["a", ""])


def steps(text: bytes, last: int | None = None, finish: str = "length") -> list[Step]:
    ids = [*text, *([] if last is None else [last])]
    return [Step(0, token, finish if i == len(ids) - 1 else None) for i, token in enumerate(ids)]


@pytest.mark.parametrize(
    "given, stop, expected, finish",
    [
        (steps("aé".encode()), (), "aé", "length"),
        (steps("aé".encode()[:-1]), (), "a\ufffd", "length"),  # cut within a character
        (steps(b"ab", 256, "stop"), (), "ab", "stop"),  # the stop token is no text
        (steps(b"abEN", 256, "stop"), ("END",), "abEN", "stop"),  # what was held back comes at the end
        (steps(b"abENDcd"), ("END",), "ab", "stop"),
        (steps(b"abEND"), ("END",), "ab", "stop"),
    ],
)
def test_text_of_tokens(given, stop, expected, finish):
    text, pieces = TextOf(Tokenizer.load("bytes"), (256,), stop), []
    for step in given:
        assert text.finish is None
        pieces.append(text.push(step))
        if text.finish:
            break
    assert "".join(pieces) == expected and text.finish == finish


def test_stop_tokens_of_a_run(tmp_path):
    tokenizer, path = Tokenizer.load("bytes"), tmp_path / "generation.json"
    assert _stop_tokens(path, tokenizer) == (256,)
    path.write_text('{"eos_token_ids": [3, 256]}')
    assert _stop_tokens(path, tokenizer) == (3, 256)
    for wrong in ("[]", '{"eos_token_ids": []}', '{"eos_token_ids": [257]}', '{"eos_token_ids": [true]}'):
        path.write_text(wrong)
        with pytest.raises(DataError, match=r"generation.json: must hold .* with ids from 0 to 256, got"):
            _stop_tokens(path, tokenizer)
    path.write_text("{")
    with pytest.raises(DataError, match=r"generation.json: cannot be read as JSON"):
        _stop_tokens(path, tokenizer)
