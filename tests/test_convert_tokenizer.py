"""Tokenizer, chat template and the tokens that end an answer, both ways. No device needed."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from megakern.config import ConfigError
from megakern.convert import proof
from megakern.convert.run import convert
from megakern.data.chat import ChatTemplate
from megakern.data.files import DataError
from megakern.data.tokenizer import Tokenizer
from megakern.inference import load_run, prompt_ids
from tests import hf_models
from tests.hf_models import edit, transformers

TEXTS = ["the cat sat", "  12 + 30\n\n\tdef f(x):\n", "naïve 漢字 🙂 \x00", "a<|endoftext|>b"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat."}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "hf"
    hf_models.save("llama2", folder)
    return folder


@pytest.fixture
def hf(saved, tmp_path, without_fsync):
    """A folder whose tokenizer has the tokens of a chat, 280 to 283."""
    folder = shutil.copytree(saved, tmp_path / "hf")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    library.save(str(folder / "tokenizer.json"))
    return folder


def both_ways(hf, **how):
    """(the run, the folder exported from it)."""
    run, out = hf.parent / "run", hf.parent / "out"
    convert(hf, run, proof=False, **how)
    convert(run, out)
    return run, out


def refused(folder, message: str, **how) -> None:
    with pytest.raises((ConfigError, DataError)) as error:
        convert(folder, folder.parent / "run", **how)
    assert re.search(message, str(error.value)), str(error.value)
    assert not (folder.parent / "run").exists()


def test_the_tokenizer_is_the_same_everywhere(hf):
    run, out = both_ways(hf)
    first, again = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (hf, out))
    ours = Tokenizer.load(run / "tokenizer.json")
    for text in TEXTS:
        ids = ours.encode(text, allow_special=True)
        assert first(text)["input_ids"] == again(text)["input_ids"] == ids
        assert again.decode(ids) == ours.decode(ids)
    assert json.loads((hf / "tokenizer.json").read_text()) == json.loads((out / "tokenizer.json").read_text())
    assert again.model_max_length == 64 and again.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("place", ["file", "text", "list"])
def test_the_chat_template_goes_along(hf, place):
    special = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    if place == "file":
        (hf / "chat_template.jinja").write_text(TEMPLATE)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    value = {"file": "{{ 'older' }}", "text": TEMPLATE, "list": named}[place]
    edit(hf, "tokenizer_config.json", chat_template=value, tokenizer_class="PreTrainedTokenizerFast", **special)
    run, out = both_ways(hf)
    assert (run / "chat_template.jinja").read_text() == TEMPLATE
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "<|im_end|>", "<|endoftext|>")
    ours = ChatTemplate.load(run)
    for ask in (False, True):
        text = ours.render(TALK, add_generation_prompt=ask)
        assert text.startswith("<s><|im_start|>user\nthe cat?<|im_end|>\n")
        assert again.apply_chat_template(TALK, tokenize=False, add_generation_prompt=ask) == text
        ids = again.apply_chat_template(TALK, tokenize=True, add_generation_prompt=ask, return_dict=False)
        assert ids == ours.encode(TALK, Tokenizer.load(run / "tokenizer.json"), add_generation_prompt=ask)


def test_what_the_tokenizer_puts_before_a_prompt(hf):
    """As Llama's <s>: transformers' generate reads it, and so does ours; a document of training has none."""
    library = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 282)])
    library.save(str(hf / "tokenizer.json"))
    run, out = both_ways(hf)
    loaded = load_run(run)
    for text in ("", *TEXTS[:3]):
        wanted = transformers.AutoTokenizer.from_pretrained(hf)(text)["input_ids"]
        assert list(prompt_ids(loaded, text)) == wanted == [282, *loaded.tokenizer.encode(text)]
        assert transformers.AutoTokenizer.from_pretrained(out)(text)["input_ids"] == wanted
    assert loaded.tokenizer.encode_prompt("a<s>b")[1:] == loaded.tokenizer.encode("a<s>b"), "text makes no tokens"


def test_tokens_that_end_an_answer(hf):
    edit(hf, eos_token_id=281)
    edit(hf, "generation_config.json", eos_token_id=[281, 0], do_sample=True, temperature=0.6)
    edit(hf, "tokenizer_config.json", bos_token="<s>")
    run, out = both_ways(hf)
    assert json.loads((run / "generation.json").read_text()) == {"eos_token_ids": [281, 0]}
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == [281, 0] and model.generation_config.bos_token_id == 282
    assert model.config.eos_token_id == [281, 0] and model.config.bos_token_id == 282
    edit(hf, "generation_config.json", remove=("eos_token_id",))
    shutil.rmtree(run)
    convert(hf, run, proof=False)
    assert json.loads((run / "generation.json").read_text()) == {"eos_token_ids": [281]}, "that of config.json"


def test_without_any_the_end_of_a_document_ends_an_answer(hf):
    edit(hf, eos_token_id=None)
    edit(hf, "generation_config.json", remove=("eos_token_id",))
    run, out = both_ways(hf)
    assert not (run / "generation.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == 0 and model.generation_config.bos_token_id is None


def test_an_end_of_document_by_another_name(hf):
    """The vocabulary has none of the known names: what the config says ends a text is taken."""
    text = (hf / "tokenizer.json").read_text().replace("<|endoftext|>", "<|fin|>")
    (hf / "tokenizer.json").write_text(text)
    run, out = both_ways(hf)
    ours = Tokenizer.load(run / "tokenizer.json")
    assert (ours.eod, ours.eod_token) == (0, "<|fin|>")
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<|fin|>"
    edit(hf, eos_token_id=5)
    edit(hf, "generation_config.json", eos_token_id=None)
    shutil.rmtree(run)
    refused(hf, r"tokenizer.json: the vocabulary does not have an end-of-document token")


def test_bytes(hf):
    run, out = both_ways(hf, tokenizer="bytes")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), Tokenizer.load("bytes")
    assert Tokenizer.load(run / "tokenizer.json").kind == "bytes"
    everything = [*TEXTS, "".join(map(chr, range(0x500)))]
    for text in everything:
        ids = ours.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text


def test_tokens_that_another_tokenizer_does_not_have_are_left_out(hf):
    edit(hf, eos_token_id=[281, 5])
    edit(hf, "generation_config.json", remove=("eos_token_id",))
    edit(hf, "tokenizer_config.json", eos_token="<|endoftext|>", bos_token="<s>", chat_template=TEMPLATE)
    run, _ = both_ways(hf, tokenizer="bytes")
    assert json.loads((run / "generation.json").read_text()) == {"eos_token_ids": [5]}
    assert json.loads((run / "special_tokens.json").read_text()) == {"eos_token": "<|endoftext|>"}
    assert ChatTemplate.load(run).source == TEMPLATE


def test_another_tokenizer_by_name(hf, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    (hf / "tokenizer.json").unlink()
    refused(hf, "tokenizer.json: missing; name one with --tokenizer")
    (hf / "tokenizer.model").write_bytes(b"\n")
    refused(hf, "There is tokenizer.model of SentencePiece; transformers' save_pretrained makes tokenizer.json of it")
    convert(hf, tmp_path / "run", tokenizer=str(other), proof=False)
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").sha256 == Tokenizer.load(other / "tokenizer.json").sha256


def test_vocab_and_merges_of_gpt2(tmp_path, without_fsync):
    """Folders of before tokenizer.json."""
    folder = tmp_path / "hf"
    hf_models.save("gpt2", folder)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(["the cat's 42 dogs don't see the 3 cats\n"] * 5, trainer)
    library.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    convert(folder, tmp_path / "run", proof=False)
    ours = Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    for text in [*TEXTS, "the cats don't see 3,14159 dogs  \n  at all"]:
        ids = ours.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == ids and ours.decode(ids) == text
    (folder / "merges.txt").write_text("#version: 0.2\nx yy zz\n")
    with pytest.raises(ConfigError, match=r"vocab\.json, merges\.txt: not a byte-pair encoding"):
        convert(folder, tmp_path / "other")


BAD = [
    ("tokenizer_config.json", {"eos_token": 5}, "tokenizer_config.json: eos_token must be the text of a token, got 5"),
    ("tokenizer_config.json", {"chat_template": 5}, "tokenizer_config.json: chat_template must be a text"),
    ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "x"}]}, "a list with one named 'default'"),
    ("tokenizer_config.json", {"chat_template": "{% for %}"}, "tokenizer_config.json: chat template, line 1"),
    ("generation_config.json", {"eos_token_id": 301}, r"eos_token_id must be token ids below 301, got 301"),
    ("generation_config.json", {"eos_token_id": [0, 290]}, r"eos_token_id \[290\] are no ids of the tokenizer, which"),
    ("generation_config.json", {"eos_token_id": [True]}, r"eos_token_id must be token ids below 301"),
    ("tokenizer.json", {"model": {"type": "Magic"}}, "tokenizer.json: not a file of the tokenizers library"),
]


@pytest.mark.parametrize("file, change, message", BAD)
def test_refused(hf, file, change, message):
    edit(hf, file, **change)
    refused(hf, message)


def test_a_template_of_another_kind(hf):
    (hf / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refused(hf, "chat_template.jinja: .*utf-8")
    (hf / "chat_template.jinja").write_text("x" * (2**20 + 1))
    refused(hf, "chat_template.jinja: a chat template may have")
    (hf / "chat_template.jinja").unlink()
    (hf / "chat_template.jinja").symlink_to("/etc/hostname")
    refused(hf, "chat_template.jinja: a link that leads out of the folder")


def test_more_ids_than_the_embedding_has_rows(hf):
    library = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))
    library.add_special_tokens([f"<|{i}|>" for i in range(30)])
    library.save(str(hf / "tokenizer.json"))
    refused(hf, "tokenizer.json: it has 31[0-9] ids, the model's vocabulary is 301")


def test_files_of_a_run_that_were_changed(hf, tmp_path):
    run, _ = both_ways(hf)
    (run / "generation.json").write_text('{"eos_token_ids": ["x"]}')
    with pytest.raises(ConfigError, match="run: eos_token_id must be token ids below"):
        convert(run, tmp_path / "other")


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(hf, monkeypatch):
    """As for a model type for which it takes a class of its own, whatever tokenizer.json says."""
    convert(hf, hf.parent / "run")

    class Other:
        def __call__(self, text, **_):
            return {"input_ids": [1, 2, 3]}

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: Other())
    with pytest.raises(proof.ProofError, match=r"transformers' Other reads this tokenizer\.json in another way"):
        convert(hf.parent / "run", hf.parent / "out")
    assert not (hf.parent / "out").exists()
    convert(hf.parent / "run", hf.parent / "out", proof=False)
