"""The command `megakern`: flags to one function call. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done; 2 wrong options, settings or data; 1 a failure at work, as a full
    disk; 128 + n stopped by signal n."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings: list[str] = []
    if words[:1] and words[0] in OPTIONS_BESIDE_SETTINGS:
        words, settings = _split_settings(words, OPTIONS_BESIDE_SETTINGS[words[0]])
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    if rest:
        parser.error(f"unknown option {rest[0]!r} for {options.command}; see megakern {options.command} --help")
    options.overrides = settings
    from megakern.config import ConfigError
    from megakern.data.files import DataError, DiskFull

    try:
        return options.run_command(options) or 0
    except (ConfigError, DataError) as error:
        return _say_error(error, 1 if isinstance(error, DiskFull) else 2)
    except KeyboardInterrupt:
        return _say_error("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has gone, as with `| head`
        sys.stderr.close()
        return 141
    except OSError as error:  # a path that the user named, or a full disk; what has no file is a bug, or the network
        if error.filename is None:
            raise
        return _say_error(f"{error.filename}: {error.strerror}; {_WAYS_OUT.get(error.errno, 'name another path')}", 1)
    except RuntimeError as error:
        from megakern.train.checkpoint import CheckpointError

        if isinstance(error, CheckpointError):
            return _say_error(error, 1)
        raise


_WAYS_OUT = {
    errno.ENOENT: "make its folder first, or check the path",
    errno.EACCES: "check its permissions, or name another path",
    errno.EPERM: "check its permissions, or name another path",
    errno.ENOSPC: "make room, or name a path on another disk",
    errno.EDQUOT: "make room, or name a path on another disk",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENOTDIR: "a part of the path is a file: name another path",
}

OPTIONS_BESIDE_SETTINGS = {
    "train": ("--out", "--resume", "--nproc", "--restarts", "--settings", "--help"),
    "plan": ("--help",),
    "verify": ("--preset", "--steps", "--layouts", "--precisions", "--backends", "--full-size", "--json", "--help"),
}


def _split_settings(words: list[str], options: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Take `--section.key value` out of the words: argparse would read a value as CONFIG.toml."""
    kept, settings = [], []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or word.partition("=")[0] in options:
            kept.append(word)
            continue
        settings.append(word)
        if "=" not in word:
            settings.extend(value for value in [next(rest, None)] if value is not None)
    return kept, settings


def _say_error(error: object, code: int) -> int:
    print(f"megakern: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    from megakern import __version__

    parser = argparse.ArgumentParser(
        prog="megakern",
        description="Train a GPT on one machine or many, and use it: text files to tokens, training, then text.",
        epilog="Begin with: megakern prepare FOLDER --out data; megakern train CONFIG.toml --out run; megakern "
        "generate run --prompt TEXT. Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"megakern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, text: str, **more) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **more)
        command.set_defaults(run_command=run)
        return command

    add("doctor", _doctor, "versions, devices, and every backend: usable, or why not")

    prepare = add("prepare", _prepare, "turn text files, folders, .jsonl and .jsonl.gz into token files")
    prepare.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="file, or folder with all below it")
    prepare.add_argument("--out", type=Path, required=True, help="folder to make")
    prepare.add_argument(
        "--tokenizer", default="train", help="train (the default: a BPE on the input), bytes, or a tokenizer.json"
    )
    prepare.add_argument("--vocab-size", type=int, default=4096, help="size of a trained vocabulary (default 4096)")
    prepare.add_argument(
        "--validation", type=float, default=0.05, metavar="PART", help="held-out part of documents (default 0.05)"
    )
    prepare.add_argument("--text-key", default="text", help="key of the text in .jsonl lines (default text)")
    prepare.add_argument("--include", nargs="+", metavar="PATTERN", help="only files like these in folders, as '*.py'")
    prepare.add_argument("--exclude", nargs="+", metavar="PATTERN", help="no files or folders named like these")
    prepare.add_argument("--strict", action="store_true", help="stop at a file that is not UTF-8, do not just count it")
    prepare.add_argument(
        "--chat", action="store_true", help="inputs are conversations: messages, or prompt and response"
    )
    prepare.add_argument("--template", type=Path, help="chat: Jinja file (default: beside --tokenizer, or our own)")
    prepare.add_argument("--longest", type=int, metavar="N", help="chat: tokens a conversation may have")
    prepare.add_argument("--too-long", choices=("refuse", "cut", "skip"), help="chat: what becomes of longer ones")
    prepare.add_argument("--overwrite", action="store_true", help="replace what is in --out")

    train = add(
        "train",
        _train,
        "train a model from a TOML file, or go on with a run; any setting: --section.key value",
        usage="megakern train CONFIG.toml --out RUN [--nproc N] [--section.key value ...]\n"
        "       megakern train --resume RUN [--nproc N] [--section.key value ...]\n"
        "       megakern train --settings",
    )
    train.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="settings; examples/demo.toml is one"
    )
    train.add_argument("--out", type=Path, metavar="RUN", help="folder of the new run")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on from the newest valid checkpoint of RUN")
    train.add_argument("--nproc", type=int, help="processes here (default: tp x dp, or one a GPU)")
    train.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="after a crash or hang, go on from the newest checkpoint; give up after N times without a newer one "
        "(default 3; 0: end at once; under torchrun and Slurm restarting is their part)",
    )
    train.add_argument("--settings", action="store_true", help="list every setting with its default, and end")

    evaluate = add("eval", _eval, "loss of a run's model on held-out tokens")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    evaluate.add_argument("--data", type=Path, help="another prepared folder (default: the run's)")
    evaluate.add_argument(
        "--answers", type=int, default=0, metavar="N", help="chat: count right ones of N held-out answers"
    )
    evaluate.add_argument("--text", type=Path, metavar="FILE", help="perplexity and bits a byte of this text instead")
    evaluate.add_argument(
        "--stride", type=int, metavar="N", help="text: tokens from window to window (default: half a window)"
    )
    evaluate.add_argument("--batches", type=int, help="stop after this many batches")

    from megakern.serve.parser import add_commands

    add_commands(add)

    plan = add("plan", _plan, "memory of one process under a layout that this machine does not have; any setting")
    plan.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="default: the default settings")

    plot = add("plot", _plot, "draw the loss curve of a run")
    plot.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    plot.add_argument("--out", type=Path, help="picture to write: .png, .svg, .pdf (default RUN/curve.png)")

    bench = add("bench", _bench, "every op and the training step beside their peers on this machine, in tables")
    bench.add_argument("--quick", action="store_true", help="three minutes on two cores: fewer shapes, no compiler")
    bench.add_argument("--only", nargs="+", default=[], metavar="PART", help="train, generate, norm, attention ...")
    bench.add_argument("--out", type=Path, metavar="DIR", help="folder for a JSON file a part")
    bench.add_argument("--minutes", type=float, metavar="N", help="limit; what no longer fits is named (default 15)")
    bench.add_argument("--backend", help="of megakern's ops (default: its own choice; on a GPU each in turn)")

    verify = add(
        "verify",
        _verify,
        "prove here that layouts do not change the result: train under each, compare losses, gradients and weights",
        usage="megakern verify [CONFIG.toml | RUN] [options] [--section.key value ...]",
        epilog="Exit code: 0 all agree, 1 one does not, 2 wrong input.",
    )
    verify.add_argument("source", nargs="?", type=Path, metavar="CONFIG.toml | RUN", help="default: --preset")
    verify.add_argument("--preset", help="a model on made-up text (default: tiny-llama)")
    verify.add_argument("--steps", type=int, default=5, help="optimizer steps of each run (default 5)")
    verify.add_argument("--layouts", nargs="+", metavar="tp=2,sp", help="default: all that fit model and machine")
    verify.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16"], metavar="PRECISION", help="default: fp32 bf16"
    )
    verify.add_argument("--backends", nargs="+", metavar="BACKEND", help="kernels to use; auto: the automatic choice")
    verify.add_argument("--full-size", action="store_true", help="do not reduce a model above 20 million parameters")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")

    convert = add(
        "convert",
        _convert,
        "make a run from a Hugging Face folder, a nanoGPT or llm.c file; or a Hugging Face folder from a run",
        epilog="The result is proven before it gets its name: tensors are read again, logits compared.",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="Hugging Face folder, RUN, ckpt.pt, model.bin")
    convert.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    convert.add_argument("--dtype", help="fp32, bf16 or fp16 (default: as stored)")
    convert.add_argument("--ranks", type=int, help="to a run: cut for this many ranks (default 1)")
    convert.add_argument("--tokenizer", metavar="FILE", help="to a run: bytes, a tokenizer.json or its folder")
    convert.add_argument("--step", type=int, help="from a run: checkpoint to use (default: the newest valid one)")
    convert.add_argument("--shard-size", type=float, metavar="GB", help="from a run: largest file (default 5)")
    convert.add_argument("--no-proof", action="store_true", help="do not compare what was written with what was read")

    ckpt = add(
        "ckpt",
        _ckpt,
        "list, describe or verify checkpoints; merge one into a file, split it again; merge adapters",
    )
    ckpt.add_argument("action", choices=("ls", "show", "verify", "merge", "split", "merge-lora"))
    ckpt.add_argument("path", type=Path, metavar="RUN", help="a run, or one checkpoint folder of it; split: the file")
    ckpt.add_argument(
        "--out",
        type=Path,
        help="merge: file to make, .safetensors; split: folder for step-XXXXXXXX; merge-lora: run",
    )
    ckpt.add_argument("--only", choices=("model", "optimizer"), help="merge: only these tensors")
    ckpt.add_argument("--ranks", type=int, help="split: cut for this many ranks (default 1); any layout can load it")
    return parser


def _doctor(options: argparse.Namespace) -> None:
    from megakern.doctor import report

    print(report())


def _prepare(options: argparse.Namespace) -> None:
    from megakern.config import require
    from megakern.data.prepare import ChatOptions, prepare

    given = {name: getattr(options, name) for name in ("template", "longest", "too_long")}
    given = {name: value for name, value in given.items() if value is not None}
    named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    require(options.chat or not given, f"{named}: for conversations; add --chat")
    manifest = prepare(
        options.inputs,
        options.out,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        validation_fraction=options.validation,
        text_key=options.text_key,
        include=tuple(options.include) if options.include else None,
        exclude=tuple(options.exclude or ()),
        strict=options.strict,
        overwrite=options.overwrite,
        chat=ChatOptions(**given) if options.chat else None,
    )
    print(manifest.describe())


def _train(options: argparse.Namespace) -> int:
    from megakern.config import ConfigError, require
    from megakern.train import launch, run
    from megakern.train.config import describe_settings, load_config
    from megakern.train.supervisor import Supervisor

    if options.settings:
        print(describe_settings())
        return 0
    if (options.config is None) == (options.resume is None):
        raise ConfigError("train: name either a CONFIG.toml and --out RUN, or --resume RUN")
    if options.resume is not None:
        config, folder = run.open_run(options.resume, options.overrides), options.resume
        config = run.fit_layout(config, options.nproc, options.overrides)
    else:
        require(options.out is not None, "train: name the folder of the new run with --out RUN")
        config, folder = load_config(options.config, options.overrides), options.out
    world = launch.joined_world()
    asked = launch.default_processes(config.parallel) if options.nproc is None else options.nproc
    nproc = int(world["WORLD_SIZE"]) if world else asked
    require(options.restarts >= 0, f"--restarts must be 0 or more, got {options.restarts}")
    require(nproc >= 1, f"--nproc must be 1 or more, got {nproc}")
    rank = int(world["RANK"]) if world else 0
    new = (run.resumed_run if options.resume else run.new_run)(config, folder, nproc, rank=rank)
    if world:
        from megakern.train.worker import work

        return work(folder, new)
    with new.locked():
        new.create()
        return Supervisor(folder, nproc, restarts=options.restarts).train()


def _eval(options: argparse.Namespace) -> None:
    from megakern.config import require
    from megakern.evaluate import evaluate_run, evaluate_text

    if options.text is not None:
        others = [name for name in ("data", "batches", "answers") if getattr(options, name)]
        require(not others, f"eval: --text is read alone, without --{', --'.join(others)}")
        print(evaluate_text(options.run, options.text, stride=options.stride))
        return
    require(options.stride is None, "eval: --stride is for --text")
    print(evaluate_run(options.run, data=options.data, batches=options.batches, answers=options.answers))


def _bench(options: argparse.Namespace) -> int:
    from megakern.bench import bench

    return bench(
        only=tuple(options.only),
        quick=options.quick,
        out=options.out,
        minutes=options.minutes,
        backend=options.backend,
    )


def _verify(options: argparse.Namespace) -> int:
    from megakern.config import require
    from megakern.verify.run import verify

    target = options.json
    require(target is None or target.parent.is_dir(), f"--json: there is no folder {target and target.parent}")
    require(target is None or not target.is_dir(), f"--json: {target} is a folder; name a file in it")
    report = verify(
        options.source,
        preset=options.preset,
        steps=options.steps,
        layouts=options.layouts,
        precisions=options.precisions,
        backends=options.backends,
        full_size=options.full_size,
        overrides=options.overrides,
    )
    print(f"{report.table()}\n{report.conclusion()}")
    if target is not None:
        target.write_text(report.as_json())
    return 0 if report.passed else 1


def _plan(options: argparse.Namespace) -> None:
    from megakern.data.progress import Meanwhile
    from megakern.plan import plan
    from megakern.train.config import load_config, make_config

    if options.config is None:
        config = make_config({}, options.overrides, "the default settings")
    else:
        config = load_config(options.config, options.overrides)
    with Meanwhile() as meanwhile:
        meanwhile.say(f"simulating a training step of {config.model.layers} layers ...")
        planned = plan(config)
    print(planned.describe())


def _plot(options: argparse.Namespace) -> None:
    from megakern.train.plot import plot_run
    from megakern.train.run import open_run

    open_run(options.run)
    print(plot_run(options.run, options.out))


def _convert(options: argparse.Namespace) -> None:
    from megakern.convert.run import convert

    size = options.shard_size
    report = convert(
        options.source,
        options.out,
        dtype=options.dtype,
        ranks=options.ranks,
        tokenizer=options.tokenizer,
        step=options.step,
        shard_bytes=None if size is None else int(size * 1e9),
        proof=not options.no_proof,
    )
    print(report)


def _ckpt(options: argparse.Namespace) -> int:
    from megakern.config import require
    from megakern.train.checkpoint_merge import merge, split

    action = options.action
    for name, actions in (("out", ("merge", "split", "merge-lora")), ("only", ("merge",)), ("ranks", ("split",))):
        given = getattr(options, name) is not None
        require(not given or action in actions, f"ckpt {action} takes no --{name}; it is for {' and '.join(actions)}")
    require(
        action not in ("merge", "split", "merge-lora") or options.out is not None,
        f"ckpt {action}: name what to make with --out",
    )
    if action == "merge":
        print(merge(options.path, options.out, only=options.only))
        return 0
    if action == "merge-lora":
        from megakern.train.run import open_run
        from megakern.train.start import merge_run

        open_run(options.path)
        print(merge_run(options.path, options.out))
        return 0
    if action == "split":
        print(f"made {split(options.path, options.out, ranks=1 if options.ranks is None else options.ranks)}")
        return 0
    from megakern.train.checkpoint import report

    text, sound = report(action, options.path)
    print(text)
    return 0 if sound else 1
