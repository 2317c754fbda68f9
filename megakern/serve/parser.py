"""The flags of `megakern generate`, `chat` and `serve`. Nothing heavy is imported to read them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """`add` as in cli.py."""
    generate = add("generate", partial(_run, "generate"), "continue a prompt with a run's model")
    generate.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    generate.add_argument(
        "--prompt", required=True, action="append", help="text to continue; - reads it from the standard input; "
        "given again, all are written at once, a line of JSON each"
    )  # fmt: skip
    _add_sampling(generate, temperature=0.0)
    generate.add_argument("--max-tokens", type=int, default=200, help="tokens to write, at most (default 200)")
    generate.add_argument("--stop", action="append", default=[], help="end before this text; may be given again")
    generate.add_argument("--beams", type=int, help="search for the likeliest text with this many beams")
    generate.add_argument(
        "--length-penalty", type=float, default=1.0, help="of --beams; above 1 favours long texts (default 1)"
    )

    chat = add(
        "chat", partial(_run, "chat"), "talk with a run's model: a line is a message; /reset, /system TEXT, /quit"
    )
    chat.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    chat.add_argument("--system", help="what the model is told first")
    _add_sampling(chat, temperature=0.7)
    chat.add_argument("--max-tokens", type=int, help="of one answer (default 512, or half of what the model reads)")
    chat.add_argument("--stop", action="append", default=[], help="end an answer before this text; may be given again")

    serve = add(
        "serve", partial(_run, "serve"), "a run behind OpenAI's API: chat, completions, models; and a chat page"
    )
    serve.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default 127.0.0.1); beyond this machine only with a token",
    )
    serve.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    serve.add_argument("--token-file", type=Path, metavar="FILE", help="file with the bearer token that /v1 asks for")
    serve.add_argument("--name", help="of the model (default: the run's folder)")
    serve.add_argument(
        "--max-requests", type=int, default=256, metavar="N", help="open texts; one more gets 429 (default 256)"
    )
    serve.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="new tokens of one text, at most (default 4096)"
    )
    serve.add_argument(
        "--max-batch", type=int, default=64, metavar="N", help="texts written at once; others wait (default 64)"
    )
    serve.add_argument("--cache-tokens", type=int, metavar="N", help="room of the cache (default: what memory allows)")
    serve.add_argument(
        "--prefill-tokens", type=int, default=512, metavar="N", help="tokens of prompts in one step (default 512)"
    )

    for command in (generate, chat, serve):
        command.add_argument("--step", type=int, help="checkpoint to use (default: the newest valid one)")
        command.add_argument(
            "--nproc", type=int, default=1, metavar="N", help="processes that share the weights (default 1)"
        )


def _add_sampling(command: argparse.ArgumentParser, *, temperature: float) -> None:
    zero = "0 takes the likeliest token"
    command.add_argument("--temperature", type=float, default=temperature, help=f"{zero} (default {temperature:g})")
    command.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    command.add_argument("--top-p", type=float, help="sample among the likeliest tokens with this much probability")
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: tokens of the text get rarer (default 1)"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of what is drawn; the same gives the same text (default 0)"
    )


def _run(name: str, options: argparse.Namespace) -> int:
    from megakern.serve.commands import run

    return run(name, options)
