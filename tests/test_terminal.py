"""`megakern generate`, `chat` and `serve` as commands, on one small run: what they print, and how they end."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from megakern.cli import main
from megakern.config import ConfigError, GPTConfig
from megakern.data.chat import ChatTemplate
from megakern.inference import Writer, load_run
from megakern.model.sampling import Sampling
from megakern.serve.chat import Chat, talk
from megakern.serve.generate import show
from tests.commands import ROOT, finish, start
from tests.runs import config_of, train
from tests.serving import tiny_loaded

MODEL = GPTConfig(layers=2, width=32, heads=4, vocab_size=257, sequence_length=64, init_std=0.2)


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "small"
    train(folder, config_of(tiny_data, MODEL, steps=1))
    return folder


@pytest.fixture
def command(capsys):
    def do(*words) -> tuple[str, str]:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr()

    return do


def texts(run, prompts, max_tokens: int, **sampling) -> list[str]:
    found = [""] * len(prompts)
    for piece in Writer(load_run(run), prompts, max_tokens=max_tokens, sampling=Sampling(**sampling)):
        found[piece.row] += piece.text
    return found


def test_generate(run, command):
    out, err = command("generate", run, "--prompt", "def f", "--max-tokens", 20)
    assert out == "def f" + texts(run, ["def f"], 20)[0] + "\n"
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s: [\d.,]+ tokens/s, prompts included\n", err)
    how = ("--temperature", 1, "--top-k", 50, "--repetition-penalty", 1.2, "--seed", 9)
    prompts = ["def f", "x", "return 1"]
    out, err = command("generate", run, *(f"--prompt={each}" for each in prompts), "--max-tokens", 10, *how)
    rows = sorted((json.loads(line) for line in out.splitlines()), key=lambda row: row["index"])
    assert [row["prompt"] for row in rows] == prompts
    drawn = {"temperature": 1, "top_k": 50, "repetition_penalty": 1.2, "seed": 9}
    assert [row["text"] for row in rows] == texts(run, prompts, 10, **drawn)
    assert err.startswith("30 tokens in ") or any(row["finish"] == "stop" for row in rows)


def test_generate_by_beams(run, command):
    alone, _ = command("generate", run, "--prompt", "def f", "--max-tokens", 8, "--beams", 1)
    assert alone == "def f" + texts(run, ["def f"], 8)[0] + "\n"
    out, _ = command("generate", run, "--prompt", "def f", "--prompt", "x", "--max-tokens", 8, "--beams", 3)
    for line in out.splitlines():
        beams = json.loads(line)["beams"]
        assert len(beams) == 3 and beams[0]["score"] >= beams[1]["score"] >= beams[2]["score"]


def test_wrong_options_of_generate(run, capsys, monkeypatch):
    for words, text in (
        (("--beams", 2, "--temperature", 1), "--beams takes no --temperature, --top-k, --top-p and --stop"),
        (("--repetition-penalty", 0), "--repetition-penalty must be above 0 (1: none), got 0.0"),
        (("--prompt", "-", "--prompt", "-"), "--prompt -: the standard input can be read once"),
    ):
        assert main(["generate", str(run), "--prompt", "a", *map(str, words)]) == 2
        assert text in capsys.readouterr().err


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded()


TEMPLATE = ChatTemplate(special_tokens={"eos_token": "<|endoftext|>"})


def test_chat_answers_what_the_model_writes_after_the_whole_conversation(loaded):
    chat = Chat(loaded, TEMPLATE, system="be brief", max_tokens=30, sampling=Sampling(temperature=0.7, seed=1))
    messages = [{"role": "system", "content": "be brief"}]
    for question in ("hello", "and then?"):
        messages.append({"role": "user", "content": question})
        ids = TEMPLATE.encode(messages, loaded.tokenizer, add_generation_prompt=True)
        writer = Writer(loaded, [ids], max_tokens=30, sampling=Sampling(temperature=0.7, seed=1))
        expected = "".join(piece.text for piece in writer)
        assert "".join(chat.answer(question)) == expected and expected
        messages.append({"role": "assistant", "content": expected})
    assert chat.turns == messages[1:]


def test_a_conversation_that_grows_too_long_loses_its_oldest_turns(loaded):
    chat = Chat(loaded, TEMPLATE, system="s" * 50, max_tokens=20)
    for i in range(8):
        list(chat.answer(f"{i}" * 60))
    assert chat.left_out > 0 and chat.turns[-2]["content"] == "7" * 60
    assert len(chat.turns) + chat.left_out == 16
    with pytest.raises(
        ConfigError, match=r"the message has \d+ tokens with what goes around it, and 492 fit beside the answer"
    ):
        list(chat.answer("x" * 500))
    assert chat.turns[-2]["content"] == "7" * 60, "the message is forgotten, and nothing else"
    with pytest.raises(ConfigError, match="max_tokens must be 1 to 511 with this model, got 512"):
        Chat(loaded, TEMPLATE, max_tokens=512)
    half = Chat(loaded, TEMPLATE, max_tokens=256, sampling=Sampling(temperature=1.0))
    default = Chat(loaded, TEMPLATE, sampling=Sampling(temperature=1.0))
    assert list(default.answer("x")) == list(half.answer("x")), "half of what the model reads"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(loaded):
    chat = Chat(loaded, TEMPLATE, max_tokens=100)
    pieces = chat.answer("a long story")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert chat.turns[-1] == {"role": "assistant", "content": said}


def test_talk_over_a_pipe(loaded, capsys, monkeypatch):
    lines = iter(["hello", "", "/system be brief", "hello", "/what", "again", "/reset", "hello", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat = Chat(loaded, TEMPLATE, max_tokens=15)
    talk(chat)
    out, err = capsys.readouterr()
    other = Chat(loaded, TEMPLATE, max_tokens=15)
    first = "".join(other.answer("hello"))
    other.system = "be brief"
    other.reset()
    second, third = "".join(other.answer("hello")), "".join(other.answer("again"))
    other.reset()
    assert out == "".join(f"{each}\n" for each in (first, second, third, "".join(other.answer("hello"))))
    assert first != second and "there is no command /what: /reset forgets" in err
    assert next(lines) == "never read"


def test_chat_as_a_command(run):
    command = [sys.executable, "-m", "megakern", "chat", str(run), "--max-tokens", "10", "--temperature", "0"]
    done = subprocess.run(
        command, input="hi\n", cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr.startswith(f"{run} has no chat_template.jinja: it has seen no "), done
    assert done.stdout == "".join(Chat(load_run(run), ChatTemplate.load(run), max_tokens=10).answer("hi")) + "\n"


def test_chat_with_a_model_of_conversations_says_nothing_of_them(run, tmp_path, command, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    ChatTemplate.load(run).save(tmp_path / "run")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    out, err = command("chat", tmp_path / "run", "--max-tokens", 10, "--temperature", 0)
    assert err == "" and out == "".join(Chat(load_run(run), ChatTemplate.load(run), max_tokens=10).answer("hi")) + "\n"


def wait_for_line(process, pattern: str) -> re.Match:
    """The first line of a `Command` that matches."""
    text, end = b"", time.monotonic() + 60
    while True:
        assert time.monotonic() < end and process.poll() is None, text
        if process._output.poll(0.1):
            text += os.read(process._output.fileno(), 1 << 16)
        found = re.search(pattern, text.decode())
        if found:
            return found


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_serve_as_a_command_ends_open_answers_first(run, number, code):
    process = start("serve", run, "--port", 0, "--max-tokens", 60)
    url = wait_for_line(process, r"small at (http://127\.0\.0\.1:\d+), cache of [\d,]+ tokens\n")[1]
    body = {"model": "small", "prompt": "a", "max_tokens": 60, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=30) as answer:
        lines = [answer.readline()]
        process.send_signal(number)
        lines += answer.readlines()
    found = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert "".join(each["choices"][0]["text"] for each in found) == texts(run, ["a"], 60)[0]
    assert lines[-2] == b"data: [DONE]\n"
    assert finish(process, code) == ""


def test_serve_refuses_what_others_could_reach(run, capsys):
    assert main(["serve", str(run), "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 can be reached from other machines: guard it with --token-file" in capsys.readouterr().err
    assert main(["serve", str(run), "--port", "0", "--max-requests", "0"]) == 2
    assert "max_requests must be 1 or more, got 0" in capsys.readouterr().err


def test_text_cannot_steer_the_terminal(capsys, monkeypatch):
    text = "a\x1b[2J\tb\r\x07\n\x9bc\x7f é"
    show(text)
    assert capsys.readouterr().out == text, "a file or pipe gets all"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(text)
    assert capsys.readouterr().out == "a\ufffd[2J\tb\ufffd\ufffd\n\ufffdc\ufffd é"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--nproc", "2")], ids=["one process", "two"])
def test_chat_in_a_terminal(run, more):
    """A prompt, history by the arrow keys, Ctrl-C within an answer, Ctrl-D."""
    words = ["chat", str(run), "--max-tokens", "30", "--temperature", "1", *more]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(
            sys.executable, [sys.executable, "-m", "megakern", *words],
            {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    text = b""

    def until(wanted: bytes) -> bytes:
        nonlocal text
        end = time.monotonic() + 60
        while wanted not in text:
            assert time.monotonic() < end, text
            if select.select([terminal], [], [], 0.1)[0]:
                text += os.read(terminal, 4096)
        found, text = text, b""
        return found

    assert b"Ctrl-C stops an answer" in until(b"> ")
    os.write(terminal, b"hello\r")
    until(b"\n\x1b[?2004h> ")
    os.write(terminal, b"/what\r")
    assert b"there is no command /what" in until(b"> ")
    os.write(terminal, b"\x1b[A\x7f\r")
    assert b"there is no command /wha:" in until(b"> ")
    os.write(terminal, b"a long story\r")
    until(b"story")
    os.write(terminal, b"\x03")  # within the answer, or just after it
    until(b"> ")
    time.sleep(1)  # it has ended by now
    os.write(terminal, b"\x03")
    until(b"or Ctrl-D\r\n\x1b[?2004h> ")
    time.sleep(1)  # of two processes the launcher sends it on, too
    os.write(terminal, b"\x04")
    assert os.waitpid(pid, 0)[1] == 0


def two_processes(*words: object, code: int = 0) -> str:
    return finish(start(*words, "--nproc", 2), code)


def test_two_processes_write_what_one_writes(run):
    out = two_processes("generate", run, "--prompt", "def f", "--max-tokens", 12, "--temperature", 1, "--seed", 3)
    assert out.startswith("def f" + texts(run, ["def f"], 12, temperature=1, seed=3)[0] + "\n") and "tokens/s" in out
    beams = two_processes("generate", run, "--prompt", "def f", "--max-tokens", 8, "--beams", 1)
    assert beams.startswith("def f" + texts(run, ["def f"], 8)[0] + "\n")


def test_two_processes_serve(run):
    process = start("serve", run, "--port", 0, "--nproc", 2)
    url = wait_for_line(process, r"small at (http://127\.0\.0\.1:\d+).*\n")[1]
    for prompt in (["a", "def f", "x"], ["b"]):  # the engine goes on after it was idle
        body = {"model": "small", "prompt": prompt, "max_tokens": 20, "temperature": 0, "stop": ["##"]}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=30) as answer:
            choices = json.loads(answer.read())["choices"]
        assert [choice["text"] for choice in choices] == texts(run, prompt, 20)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 143) == ""


def test_what_is_wrong_with_two_processes_is_said_once(run):
    text = two_processes("generate", run, "--prompt", "a" * 100, code=2)
    assert text == "megakern: the prompt has 100 tokens; this model reads 64 in all, so give it fewer than that\n"
    assert "--nproc must be 1 or more, got 0" in finish(start("generate", run, "--prompt", "a", "--nproc", 0), 2)
    text = finish(start("generate", run, "--prompt", "a", "--nproc", 3), 2)
    assert text == "megakern: model.kv_heads = 4 is not divisible by parallel.tp = 3; choose another tp\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_request_that_the_docs_show(run):
    shown = re.search(
        r"^    (curl -s http://127\.0\.0\.1:8000/v1/.*\n.*)", (ROOT / "docs/models.md").read_text(), re.M
    )[1]
    process = start("serve", run, "--port", 0, "--name", "RUN")
    url = wait_for_line(process, r"RUN at (http://127\.0\.0\.1:\d+)")[1]
    asked = shown.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60, check=True)
    process.send_signal(signal.SIGTERM)
    assert done.stdout.startswith('data: {"id":"chatcmpl-') and done.stdout.endswith("data: [DONE]\n\n"), done.stdout
    finish(process, 143)
