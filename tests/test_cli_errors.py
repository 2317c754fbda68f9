"""Wrong input to the commands: one clear sentence, a non-zero exit code, before any worker starts. No device needed."""

from __future__ import annotations

import re
import shutil
import struct

import pytest

from megakern.cli import _parser, main
from megakern.config import ConfigError
from megakern.train import supervisor
from megakern.train.config import load_config
from megakern.train.run import new_run, resumed_run

CONFIG = """
[model]
preset = "tiny-gpt2"
vocab_size = 257
sequence_length = 32
[data]
path = "{data}"
[train]
steps = 4
batch = 2
precision = "fp32"
"""


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A run of four steps, and its settings file."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.toml").write_text(CONFIG.format(data=tiny_data))
    assert main(["train", str(folder / "config.toml"), "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a command that must be refused: returns the message; fails if a worker was started."""

    def no_workers(*_, **__):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(supervisor, "Supervisor", no_workers)

    def run(*words: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        message = capsys.readouterr().err.strip()
        assert len(message.splitlines()) == 1, message
        assert message.startswith("megakern: ")
        return message

    return run


def train_words(trained, tmp_path, *more: object) -> list[object]:
    return ["train", trained / "config.toml", "--out", tmp_path / "new", "--nproc", 2, *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.layrs", "3"], r"unknown key 'model.layrs'; did you mean 'model.layers'\?"),
        (["--layers", "3"], r"did you mean --model.layers\?"),
        (
            ["--model.heads", "3", "--model.width", "48", "--parallel.tp", "2"],
            "kv_heads = 3 is not divisible by parallel.tp = 2",
        ),
        (
            ["--parallel.tp", "2", "--parallel.sequence_parallel", "true", "--model.sequence_length", "31"],
            "model.sequence_length = 31 is not divisible by parallel.tp = 2, which parallel.sequence_parallel needs",
        ),
        (["--parallel.tp", "4"], "parallel.tp = 4 x parallel.dp = 1 needs 4 processes, but there are 2"),
        (["--parallel.dp", "2", "--train.batch", "3"], r"batch = 3 must be a multiple of parallel.dp = 2; .*: 2, 4"),
        (["--data.path", "/nowhere"], "/nowhere"),
        (["--model.vocab_size", "100"], "model.vocab_size = 100 is less than the vocabulary"),
        (["--model.sequence_length", "10000000"], "10,000,001 tokens"),
        (["--train.steps", "-1"], "train.steps must be 1 or more"),
        (["--model.preset", "gpt3-175b"], r"the training states take 2,\d\d\d\.\d GiB here .*, and this machine has"),
    ],
)
def test_settings(refused, trained, tmp_path, more, message):
    assert re.search(message, refused(*train_words(trained, tmp_path, *more)))
    assert not (tmp_path / "new").exists(), "nothing may be written before the settings are known to be right"


def test_options_of_train(refused, trained, tmp_path):
    assert "name either a CONFIG.toml and --out RUN, or --resume RUN" in refused("train")
    assert "--out RUN" in refused("train", trained / "config.toml")
    assert "is a run already; go on with: megakern train --resume" in refused(
        "train", trained / "config.toml", "--out", trained / "run"
    )
    assert "is not a run" in refused("train", "--resume", tmp_path)
    assert "there is no such configuration file" in refused("train", tmp_path / "no.toml", "--out", tmp_path / "x")
    assert "is a folder; name the .toml file" in refused("train", tmp_path, "--out", tmp_path / "x")
    for count in (-1, 0):
        assert f"--nproc must be 1 or more, got {count}" in refused(*train_words(trained, tmp_path, "--nproc", count))


def test_a_folder_of_data_does_not_become_a_run(refused, trained, data_copy):
    held = {path.name: path.read_bytes() for path in data_copy.iterdir()}
    words = ["train", trained / "config.toml", "--out", data_copy]
    assert "holds a tokenizer.json of prepared data or of another model; name another --out" in refused(*words)
    assert {path.name: path.read_bytes() for path in data_copy.iterdir()} == held


def test_paths_that_cannot_be_used(refused, trained, tmp_path):
    run = trained / "run"
    message = refused("plot", run, "--out", tmp_path / "none" / "x.png", code=1)
    assert message.endswith("x.png: No such file or directory; make its folder first, or check the path")
    (tmp_path / "x.svg").mkdir()
    assert refused("plot", run, "--out", tmp_path / "x.svg", code=1).endswith(
        "Is a directory; it is a folder: name a file"
    )
    assert "is a folder; name a file in it" in refused("verify", "--json", tmp_path)
    assert "is a folder; name the .toml file" in refused("plan", tmp_path)
    assert "out.txt: is a file, not a folder" in refused("prepare", run, "--out", _file(tmp_path / "out.txt"))
    message = refused("bench", "--only", "norm", "--quick", "--out", tmp_path / "out.txt", code=1)
    assert "out.txt: File exists; name another path" in message


def _file(path):
    path.write_text("mine")
    return path


@pytest.fixture
def data_copy(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data"


def test_empty_bin(refused, trained, tmp_path, data_copy):
    (data_copy / "train.bin").write_bytes(b"")
    message = refused(*train_words(trained, tmp_path, "--data.path", data_copy))
    assert "train.bin" in message
    assert "empty" in message


def test_truncated_bin(refused, trained, tmp_path, data_copy):
    path = data_copy / "train.bin"
    path.write_bytes(path.read_bytes()[:-10])
    message = refused(*train_words(trained, tmp_path, "--data.path", data_copy))
    assert "train.bin" in message
    assert re.search("truncated|bytes", message)


def test_idx_whose_counts_point_past_the_file(refused, trained, tmp_path, data_copy):
    path = data_copy / "train.idx"
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<Q", 1 << 40)
    path.write_bytes(content)
    message = refused(*train_words(trained, tmp_path, "--data.path", data_copy))
    assert "train.idx" in message


def test_tokenizer_other_than_the_datas(refused, trained, tmp_path, data_copy):
    path = data_copy / "tokenizer.json"
    path.write_text(path.read_text().replace("endoftext", "endoftxt"))
    assert "tokenizer" in refused(*train_words(trained, tmp_path, "--data.path", data_copy))


@pytest.fixture
def run_copy(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def test_data_of_another_tokenizer_than_the_checkpoint(refused, trained, run_copy, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"a text number {i} " * 60)
    words = ["prepare", corpus, "--out", tmp_path / "other", "--vocab-size", 257, "--validation", "0.2"]
    assert main([str(word) for word in words]) == 0
    assert "tokenizer" in refused("eval", run_copy, "--data", tmp_path / "other")
    assert "tokenizer" in refused("train", "--resume", run_copy, "--data.path", tmp_path / "other", "--train.steps", 6)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.layers", "5"),
        ("model.heads", "2"),  # the same shapes, another model
        ("model.sequence_length", "64"),  # of learned positions
        ("model.tied_embeddings", "false"),
        ("optimizer.state_dtype", "bfloat16"),
        ("lora.alpha", "3.0"),
    ],
)
def test_a_run_keeps_what_its_checkpoint_is_made_of(refused, run_copy, option, value):
    before = (run_copy / "config.toml").read_bytes()
    message = refused("train", "--resume", run_copy, "--train.steps", 6, f"--{option}", value)
    assert f"{option} was " in message and "and a run keeps it, got" in message and "--train.init_from" in message
    assert (run_copy / "config.toml").read_bytes() == before


def test_masters_keep_their_precision_and_other_settings_may_change(run_copy):
    def resumed(*words: str):
        return resumed_run(load_config(run_copy / "config.toml", list(words)), run_copy, 1).config

    with pytest.raises(ConfigError, match=r"optimizer\.master was 'none' when .* and a run keeps it, got 'fp32'"):
        resumed("--optimizer.master", "fp32", "--train.precision", "bf16")
    changed = resumed(
        "--model.dropout", "0.1", "--model.window", "9", "--train.precision", "bf16", "--optimizer.lr", "1e-5"
    )
    assert (changed.model.dropout, changed.model.window, changed.train.precision) == (0.1, 9, "bf16")


def test_flipped_bit_in_the_only_checkpoint(refused, run_copy):
    shard = next((run_copy / "ckpt").glob("step-*/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    assert shard.name in refused("generate", run_copy, "--prompt", "a", code=1)
    assert main(["ckpt", "verify", str(run_copy)]) == 1


def test_text_that_fills_the_model_says_so(trained, capsys):
    words = ["generate", str(trained / "run"), "--prompt", "a" * 30, "--max-tokens"]
    assert main([*words, "9"]) == 0
    assert "the text ends here: this model reads 32 tokens in all" in capsys.readouterr().err
    assert main([*words, "2"]) == 0
    assert "ends here" not in capsys.readouterr().err


def test_generation_options(refused, trained):
    run = trained / "run"
    assert "--temperature must be 0 (greedy) or more" in refused("generate", run, "--prompt", "a", "--temperature", -1)
    assert "--top-k must be 1 or more" in refused("generate", run, "--prompt", "a", "--top-k", 0)
    assert "--top-p must be in (0, 1]" in refused("generate", run, "--prompt", "a", "--top-p", 1.5)
    assert "this model reads 32 in all" in refused("generate", run, "--prompt", "a" * 40)
    assert "a stop string must not be empty" in refused("generate", run, "--prompt", "a", "--stop", "")


def test_options_say_what_they_are_and_what_they_are_without():
    commands = next(action for action in _parser()._actions if action.dest == "command").choices
    assert len(commands) == 13
    for name, command in commands.items():
        for option in command._actions:
            what = f"{name}: {option.option_strings or option.metavar}"
            named = option.choices is not None and not option.option_strings
            assert option.help or named, f"{what} has no help"
            if option.default not in (None, False, [], "==SUPPRESS=="):
                values = option.default if isinstance(option.default, list) else [option.default]
                shown = " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
                assert shown in option.help and "default" in option.help, f"{what}: {shown}"


def test_unknown_command_and_option_end_with_2(capsys):
    for words, text in (
        (["trian"], "invalid choice: 'trian'"),
        (["doctor", "--fast"], "unknown option '--fast' for doctor"),
    ):
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 2
        assert text in capsys.readouterr().err


def test_the_first_rank_alone_says_which_precision_was_chosen(trained, tmp_path, capsys):
    config = load_config(trained / "config.toml", ["--train.precision", "auto"])
    for rank, lines in ((0, 1), (1, 0)):
        made = new_run(config, tmp_path / "new", 1, rank=rank)
        assert made.config.train.precision in ("fp32", "bf16")
        assert len(re.findall(r"^precision (?:fp32|bf16): .*\n", capsys.readouterr().out)) == lines


def test_a_finished_run_has_no_speed(trained, capfd):
    assert main(["train", "--resume", str(trained / "run")]) == 0
    assert "  speed            none: the last step was made before" in capfd.readouterr().out


def test_commands_on_a_sound_run(trained, capsys, tmp_path):
    run = str(trained / "run")
    for words, text in (
        (["ckpt", "ls", run], "step-00000004"),
        (["ckpt", "show", run], "model.embedding.weight"),
        (["ckpt", "verify", run], "sound"),
        (["eval", run, "--batches", "2"], "bits a byte"),
        (["generate", run, "--prompt", "def", "--max-tokens", "5", "--temperature", "1", "--top-k", "5"], "def"),
        (["plot", run, "--out", str(tmp_path / "x.svg")], "x.svg"),
        (["doctor"], "backends"),
    ):
        assert main(words) == 0, words
        assert text in capsys.readouterr().out, words
