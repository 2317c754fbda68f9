"""Text streaming around generation. No device needed."""

from __future__ import annotations

import pytest

from megakern.inference import until_stop

TEXTS = ["", "abc", "xENDy", "xENx ENDz", "aaab", "a\n\nb", "def f(): END", "EN", "aabaab"]


def streamed(text: str, size: int, stop: tuple[str, ...]) -> list[str]:
    return list(until_stop((text[i : i + size] for i in range(0, len(text), size)), stop))


@pytest.mark.parametrize("word", ["END", "\n\n", "aab", "a", "def"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 99])
@pytest.mark.parametrize("text", TEXTS)
def test_one_stop_string_cuts_like_a_search_of_the_whole_text(text, size, word):
    pieces = streamed(text, size, (word,))
    assert "".join(pieces) == text.split(word)[0]
    assert all(pieces), "an empty piece is no news"


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
