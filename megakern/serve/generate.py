"""`megakern generate`: one prompt to text as it is made, or several at once to a line of JSON each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from megakern.config import require
from megakern.inference import Loaded, Writer, best_texts
from megakern.model.sampling import Sampling

# All of C0 but tab and line end, DEL, and C1: a model must not steer the terminal that shows its text.
_CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10}, "\ufffd")


def show(text: str) -> None:
    """To the standard output, at once; to a terminal without control characters."""
    print(text.translate(_CONTROL) if sys.stdout.isatty() else text, end="", flush=True)


def write_prompts(
    loaded: Loaded, prompts: Sequence[str], *, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
) -> None:
    """Print what follows each prompt, and on the standard error the speed. Raises ConfigError."""
    start = time.perf_counter()
    writer = Writer(loaded, prompts, max_tokens=max_tokens, sampling=sampling, stop=stop)
    if len(prompts) == 1:
        show(prompts[0])
        finish = None
        for piece in writer:
            show(piece.text)
            finish = piece.finish
        show("\n")
        if finish == "length" and writer.tokens < max_tokens:
            longest = loaded.config.model.sequence_length
            print(f"the text ends here: this model reads {longest} tokens in all", file=sys.stderr)
    else:
        texts = [""] * len(prompts)
        for piece in writer:
            texts[piece.row] += piece.text
            if piece.finish is not None:
                row = {"index": piece.row, "prompt": prompts[piece.row], "text": texts[piece.row]}
                print(json.dumps({**row, "finish": piece.finish}, ensure_ascii=False), flush=True)
    _say_speed(writer.tokens, time.perf_counter() - start)


def write_best(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    beams: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
) -> None:
    """Print the best text that beam search finds after a prompt, or all of them for several, a line of JSON each."""
    start, tokens = time.perf_counter(), 0
    how = {"beams": beams, "max_tokens": max_tokens, "length_penalty": length_penalty}
    for index, prompt in enumerate(prompts):
        found = best_texts(loaded, prompt, repetition_penalty=repetition_penalty, **how)
        tokens += max(each.tokens for each in found)
        if len(prompts) == 1:
            show(prompt + found[0].text + "\n")
        else:
            beams_found = [{"text": each.text, "score": round(each.score, 4)} for each in found]
            print(json.dumps({"index": index, "prompt": prompt, "beams": beams_found}, ensure_ascii=False), flush=True)
    _say_speed(tokens, time.perf_counter() - start)


def _say_speed(tokens: int, seconds: float) -> None:
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:,.1f} tokens/s, prompts included", file=sys.stderr)


def read_prompts(words: Sequence[str]) -> list[str]:
    """ "-" is what the standard input holds. Raises ConfigError when it is named twice."""
    require(words.count("-") <= 1, "--prompt -: the standard input can be read once")
    return [sys.stdin.read() if word == "-" else word for word in words]
