"""The commands that use a model, `generate`, `chat` and `serve`: from flags to what is done with a loaded run."""

from __future__ import annotations

import argparse
import sys

from megakern.config import ConfigError, require
from megakern.data.chat import TEMPLATE_FILE, ChatTemplate
from megakern.inference import Loaded, load_run
from megakern.model.sampling import Sampling


def run(name: str, options: argparse.Namespace) -> int:
    """What `megakern NAME` does: flags are checked before a model is loaded or a process started."""
    CHECKS[name](options)
    if options.nproc != 1:
        from megakern.serve.ranks import run_on

        return run_on(options.nproc, name, options)
    return COMMANDS[name](options, load_run(options.run, step=options.step)) or 0


def _sampling(options: argparse.Namespace) -> Sampling:
    """Raises ConfigError that names the option."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    try:
        return Sampling(**{name: getattr(options, name) for name in names})
    except ConfigError as error:
        name, rest = str(error).split(" ", 1)
        raise ConfigError(f"--{name.replace('_', '-')} {rest}") from error


def _check_generate(options: argparse.Namespace) -> None:
    from megakern.serve.generate import read_prompts

    drawn = options.temperature or options.top_k or options.top_p or options.stop
    require(options.beams is None or not drawn, "--beams takes no --temperature, --top-k, --top-p and --stop")
    _sampling(options)
    options.prompt = read_prompts(options.prompt)


def _generate(options: argparse.Namespace, loaded: Loaded) -> None:
    from megakern.serve import generate

    if options.beams is not None:
        generate.write_best(
            loaded,
            options.prompt,
            beams=options.beams,
            max_tokens=options.max_tokens,
            length_penalty=options.length_penalty,
            repetition_penalty=options.repetition_penalty,
        )
    else:
        how = {"max_tokens": options.max_tokens, "sampling": _sampling(options), "stop": tuple(options.stop)}
        generate.write_prompts(loaded, options.prompt, **how)


def _check_chat(options: argparse.Namespace) -> None:
    _sampling(options)


def _chat(options: argparse.Namespace, loaded: Loaded) -> None:
    from megakern.serve.chat import Chat, talk

    if not (options.run / TEMPLATE_FILE).exists():
        print(
            f"{options.run} has no {TEMPLATE_FILE}: it has seen no conversations, and goes on with a text rather than "
            f"answering; conversations for it: megakern prepare --chat",
            file=sys.stderr,
        )
    how = {"max_tokens": options.max_tokens, "sampling": _sampling(options), "stop": tuple(options.stop)}
    talk(Chat(loaded, ChatTemplate.load(options.run), system=options.system, **how))


def _check_serve(options: argparse.Namespace) -> None:
    try:
        from megakern.serve import server
    except ImportError as error:
        wanted = "megakern serve needs fastapi and uvicorn: pip install 'megakern[serve]'"
        raise ConfigError(f"{wanted} ({error})") from error
    server.check_address(options.host, server.read_token(options.token_file))
    _limits(options)


def _limits(options: argparse.Namespace):
    from megakern.serve.app import Limits

    return Limits(max_requests=options.max_requests, max_tokens=options.max_tokens)


def _serve(options: argparse.Namespace, loaded: Loaded) -> int:
    from megakern.serve.server import read_token, serve

    return serve(
        loaded,
        ChatTemplate.load(options.run),
        host=options.host,
        port=options.port,
        token=read_token(options.token_file),
        name=options.name or options.run.resolve().name,
        limits=_limits(options),
        max_batch=options.max_batch,
        tokens=options.cache_tokens,
        prefill_tokens=options.prefill_tokens,
    )


CHECKS = {"generate": _check_generate, "chat": _check_chat, "serve": _check_serve}
COMMANDS = {"generate": _generate, "chat": _chat, "serve": _serve}
