"""Perplexity of texts, and the lm-evaluation-harness: against one forward pass a token, and against the harness."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from megakern import scoring
from megakern.config import ConfigError, GPTConfig
from megakern.data.chat import ChatTemplate
from megakern.data.files import DataError
from megakern.data.tokenizer import EOD, JsonTokenizer, Tokenizer, train_bpe
from megakern.evaluate import evaluate_run, evaluate_text
from megakern.evaluate_harness import Scores, harness_model
from megakern.inference import load_run
from tests import runs

T = 24
MODEL = GPTConfig(layers=2, width=32, heads=4, vocab_size=257, sequence_length=T, positions="rope")
TEXT = "The quick brown fox jumps over the lazy dog. Żółć 数学! " * 3


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A model whose weights are far from zero, so that places and contexts matter."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    model = dataclasses.replace(MODEL, init_std=0.3)
    runs.train(folder, runs.config_of(tiny_data, model, steps=2, save_every=0))
    return folder


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run)


@torch.no_grad()
def log_probability(loaded, context: list[int], token: int) -> float:
    """Of `token` after `context`: one pass for this alone."""
    logits = loaded.model(torch.tensor([context[-T:]]))[0, -1].double()
    return float(torch.log_softmax(logits, 0)[token])


@pytest.mark.parametrize("stride", [1, 7, 12, T])
def test_text_is_scored_as_token_by_token(loaded, stride):
    ids = [256, *TEXT.encode()]
    wanted = 0.0
    for place in range(1, len(ids)):
        # The first window that reaches the token: it starts at a multiple of the stride, and holds T tokens before it.
        start = max(0, -(-(place - T) // stride)) * stride
        wanted -= log_probability(loaded, ids[start:place], ids[place])
    found = scoring.score_text(loaded, TEXT, stride=stride)
    assert (found.tokens, found.bytes) == (len(ids) - 1, len(TEXT.encode()))
    assert found.nats == pytest.approx(wanted, rel=1e-5)
    shown = dict(found.lines())
    assert shown["bits a byte"] == f"{found.nats / math.log(2) / len(TEXT.encode()):.4f}"
    assert float(shown["perplexity"].split()[0].replace(",", "")) == pytest.approx(
        math.exp(wanted / found.tokens), rel=1e-4
    )


def test_more_context_or_smaller_passes_change_little(loaded, monkeypatch):
    whole = scoring.score_text(loaded, TEXT, stride=5)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 1)  # a window at a time
    assert scoring.score_text(loaded, TEXT, stride=5).nats == pytest.approx(whole.nats, rel=1e-6)
    assert scoring.score_text(loaded, "a").tokens == 1


def test_what_stands_before_a_text():
    """The end of the last one; or what the tokenizer's file puts there."""
    assert scoring.first_token(Tokenizer.load("bytes")) == 256
    library = tokenizers.Tokenizer.from_str(json.dumps(train_bpe(["a b c"], 260).content()))
    assert scoring.first_token(JsonTokenizer(json.loads(library.to_str()))) == library.token_to_id(EOD)
    library.add_special_tokens(["<s>"])
    start = library.token_to_id("<s>")
    library.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    assert scoring.first_token(JsonTokenizer(json.loads(library.to_str()))) == start


def test_the_command_shows_it(run, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    shown = evaluate_text(run, file, stride=T)
    score = scoring.score_text(load_run(run), TEXT, stride=T)
    assert f"{score.nats / math.log(2) / score.bytes:.4f}" in shown and "perplexity" in shown
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"a.txt: cannot be read as UTF-8"):
        evaluate_text(run, file)
    with pytest.raises(ConfigError, match="--stride must be from 1 to the model's sequence_length of 24, got 25"):
        scoring.score_text(load_run(run), TEXT, stride=25)
    with pytest.raises(ConfigError, match="no text to score"):
        scoring.score_text(load_run(run), "")
    with pytest.raises(ConfigError, match=r"--answers: .* is text, not conversations"):
        evaluate_run(run, answers=3)


# --- the harness ---


@pytest.fixture(scope="module")
def scores(loaded):
    return Scores(loaded, ChatTemplate(special_tokens={"eos_token": EOD}))


def ask(*arguments) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


PAIRS = [("The quick", " brown fox"), ("", "abc"), ("a b  ", "c"), ("x" * 60, "yz"), ("q", "r" * 20), ("hello", "!")]


def test_loglikelihood_is_that_of_each_token_and_greedy_is_what_is_generated(scores, loaded):
    best = []
    for context, continuation in PAIRS:
        kept = context.rstrip()  # white space between the two is the continuation's
        continuation = context[len(kept) :] + continuation
        ids, total, greedy = [*kept.encode()] or [256], 0.0, True
        for token in continuation.encode():
            total += log_probability(loaded, ids, token)
            with torch.no_grad():
                greedy &= int(loaded.model(torch.tensor([ids[-T:]]))[0, -1].argmax()) == token
            ids.append(token)
        best.append((pytest.approx(total, rel=1e-4), greedy))
    # Long contexts lose their beginning at another place here than there: compare those that fit.
    found = scores.loglikelihood([ask(*pair) for pair in PAIRS])
    fits = [i for i, (context, continuation) in enumerate(PAIRS) if len(context + continuation) <= T]
    assert [found[i] for i in fits] == [best[i] for i in fits] and len(fits) == 5
    context, continuation = PAIRS[3]
    ids = (context + continuation).encode()[-(T + 1) :]
    total = sum(log_probability(loaded, list(ids[:place]), ids[place]) for place in (T - 1, T))
    assert found[3] == (pytest.approx(total, rel=1e-4), False)


def test_the_greedy_continuation_is_known_as_such(scores, loaded):
    ids = list(b"The ")
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    (_, greedy), (_, other) = scoring.score_continuations(loaded, [(ids[:4], ids[4:]), (ids[:4], [*ids[4:8], 1])])
    assert greedy and not other


def test_rolling_is_the_text_in_windows(scores, loaded):
    texts = [TEXT, "a"]
    wanted = [-scoring.score_text(loaded, text, stride=T).nats for text in texts]
    assert scores.loglikelihood_rolling([ask(text) for text in texts]) == pytest.approx(wanted, rel=1e-6)


def test_generate_until_stops_where_it_is_told(scores, loaded):
    def greedy(text: str, count: int) -> str:
        ids = list(text.encode())
        for _ in range(count):
            with torch.no_grad():
                token = int(loaded.model(torch.tensor([ids[-T:]]))[0, -1].argmax())
            if token == loaded.tokenizer.eod:
                break
            ids.append(token)
        return bytes(ids[len(text) :]).decode(errors="replace")

    prompts = ["The ", "quick brown"]
    plain = scores.generate_until([ask(text, {"until": [], "max_gen_toks": 8}) for text in prompts])
    assert plain == [greedy(text, 8) for text in prompts]
    stop = plain[0][3]
    cut = scores.generate_until([ask(prompts[0], {"until": [stop], "max_gen_toks": 8, "do_sample": False})])
    assert cut == [plain[0][: plain[0].index(stop)]]
    mixed = scores.generate_until(
        [ask(prompts[0], {"until": stop, "max_gen_toks": 8}), ask(prompts[1], {"max_gen_toks": 3})]
    )
    assert mixed == [cut[0], greedy(prompts[1], 3)]
    assert scores.apply_chat_template([{"role": "user", "content": "x"}]) == f"{EOD}user\nx{EOD}assistant\n"


def test_what_the_harness_is_refused(scores, run):
    with pytest.raises(ConfigError, match="options of the task that are not known here: beams"):
        scores.generate_until([ask("a", {"beams": 3, "max_gen_toks": 2})])
    with pytest.raises(ConfigError, match="max_gen_toks must be from 1 to 23, the sequence less 1, got 24"):
        scores.generate_until([ask("a", {"max_gen_toks": 24})])
    with pytest.raises(ConfigError, match="a continuation has 25 tokens, the model's sequence has 24"):
        scores.loglikelihood([ask("a", "b" * 25)])
    if "lm_eval" not in sys.modules:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "lm_eval", None)
            with pytest.raises(ConfigError, match=r"cannot be imported .*; install it with: pip install"):
                harness_model(run)


HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from megakern.evaluate_harness import harness_model

model = harness_model(sys.argv[1])
assert isinstance(model, LM)
manager = TaskManager(include_path=sys.argv[2], include_defaults=False)
results = simple_evaluate(model, tasks=["choice", "perplexity", "writing"], task_manager=manager, bootstrap_iters=0)
print("RESULTS" + json.dumps(results["results"]))
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {lines}}}}}
test_split: test
output_type: {kind}
{more}
"""


@pytest.mark.slow
def test_the_harness_itself_runs_it(run, loaded, scores, tmp_path):
    """Needs `pip install megakern[eval]`, which is not among the tests' packages for its size (600 MB); or
    LM_EVAL_PATH, a folder that has it."""
    import importlib.util

    path = os.environ.get("LM_EVAL_PATH", "")
    if not path and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    questions = [("The quick", " brown", " dog"), ("fox", " jumps", " over"), ("lazy", " dog", " fox")]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"q": q, "a": a, "b": b, "text": TEXT}) + "\n" for q, a, b in questions))
    tasks = {
        "choice": (
            "multiple_choice",
            "doc_to_text: '{{q}}'\ndoc_to_choice: '{{[a, b]}}'\ndoc_to_target: 0\ntarget_delimiter: ''",
        ),
        "perplexity": (
            "loglikelihood_rolling",
            "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]",
        ),
        "writing": (
            "generate_until",
            "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ngeneration_kwargs: {until: ['zzz'], max_gen_toks: 4}",
        ),
    }
    for name, (kind, more) in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, lines=lines, kind=kind, more=more))
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, run, tmp_path],
        env={**os.environ, "PYTHONPATH": f"{os.getcwd()}:{path}", "HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.split("RESULTS")[1])
    right = [scores.loglikelihood([ask(q, a), ask(q, b)]) for q, a, b in questions]
    wanted = sum(first[0] > second[0] for first, second in right) / len(right)
    assert results["choice"]["acc,none"] == pytest.approx(wanted)
    score = scoring.score_text(loaded, TEXT, stride=T)
    assert results["perplexity"]["bits_per_byte,none"] == pytest.approx(
        score.nats / math.log(2) / score.bytes, rel=1e-5
    )
