"""What goes with the weights: tokenizer, chat template, and the tokens that end an answer, from and to both kinds of
folder. All of it is data; a chat template is text that whoever renders it has to run in a sandbox.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from megakern.config import ConfigError
from megakern.data.chat import GENERATION_FILE, LONGEST, SPECIAL_FILE, TEMPLATE_FILE, ChatTemplate
from megakern.data.files import DataError
from megakern.data.tokenizer import BYTE_NAMES, ByteTokenizer, JsonTokenizer, Tokenizer
from megakern.model.hf.reading import MAX_JSON, file_problem, read_json
from megakern.train.files import Files

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Carried:
    """What is carried along with the weights."""

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...] = ()
    """Tokens that end an answer; empty: the tokenizer's end-of-document token alone."""
    chat_template: str | None = None
    special: dict[str, str] = field(default_factory=dict)
    """Texts of special tokens by what they are for, as {"bos_token": "<s>"}."""

    def write_run(self, folder: Path, files: Files) -> None:
        """tokenizer.json, and what there is of chat_template.jinja, generation.json and special_tokens.json."""
        self.tokenizer.save(folder / "tokenizer.json")
        if self.chat_template is not None:
            files.write_file(folder / TEMPLATE_FILE, self.chat_template.encode())
        if self.eos_ids:
            files.write_file(folder / GENERATION_FILE, _json({"eos_token_ids": list(self.eos_ids)}))
        if self.special:
            files.write_file(folder / SPECIAL_FILE, _json(self.special))

    def write_hf(self, folder: Path, longest: int, files: Files) -> None:
        """The files that AutoTokenizer and `generate` of transformers read. longest: sequence, in tokens."""
        files.write_file(folder / "tokenizer.json", _json(library_table(self.tokenizer)))
        special = {"eos_token": self.tokenizer.eod_token, **self.special, "model_max_length": longest}
        how = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        files.write_file(folder / TOKENIZER_CONFIG, _json({**how, **special}))
        if self.chat_template is not None:
            files.write_file(folder / TEMPLATE_FILE, self.chat_template.encode())
        files.write_file(folder / "generation_config.json", _json(self.token_ids()))

    def token_ids(self) -> dict[str, Any]:
        """bos_token_id and eos_token_id; null where there is none, for transformers has defaults of its own."""
        ids = list(self.eos_ids) or [self.tokenizer.eod]
        bos = self.special.get("bos_token")
        return {"bos_token_id": _vocabulary(self.tokenizer).get(bos), "eos_token_id": ids[0] if len(ids) == 1 else ids}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizers.Tokenizer.from_str(json.dumps(library_table(tokenizer))).get_vocab()


def library_table(tokenizer: Tokenizer) -> dict:
    """The tokenizer as a file of the `tokenizers` library."""
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_table(tokenizer)
    content = tokenizer.content()
    return content["tokenizer"] if set(content) == {"megakern_tokenizer", "eod", "tokenizer"} else content


def _byte_table(tokenizer: ByteTokenizer) -> dict:
    """A byte-level BPE without merges: the same id for each byte."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    table = json.loads(library.to_str())
    table["model"]["vocab"] = dict(BYTE_NAMES)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    table["added_tokens"] = [{"id": tokenizer.eod, "content": tokenizer.eod_token, **flags, "special": True}]
    return table


# --- from a Hugging Face folder ---


def from_hf(folder: Path, family: str, vocab_size: int, tokenizer: str | None, problems: list[str]) -> Carried | None:
    """What a folder of Hugging Face has. None when there is a problem.

    tokenizer: use this file instead; tokens of the folder that it does not have are then left out.
    """
    before = len(problems)
    settings = _table(folder, TOKENIZER_CONFIG, problems)
    special = _special(settings, TOKENIZER_CONFIG, problems)
    wanted = {**_table(folder, "config.json", []), **_table(folder, "generation_config.json", problems)}
    eos_ids = _ids(wanted.get("eos_token_id"), vocab_size, problems)
    template = _template(folder, settings, problems)
    found = None
    try:
        if tokenizer is not None:
            found = named_tokenizer(tokenizer)
            eos_ids = tuple(each for each in eos_ids if each < found.vocab_size)
            special = {key: text for key, text in special.items() if text in _vocabulary(found)}
        elif (table := _library(folder, family, problems)) is not None:
            found = _with_eod(table, special.get("eos_token"), eos_ids)
    except DataError as error:
        problems.append(str(error))
    if found is not None and found.vocab_size > vocab_size:
        problems.append(
            f"tokenizer.json: it has {found.vocab_size} ids, the model's vocabulary is {vocab_size}; a token without a "
            f"row in the embedding cannot be read"
        )
    if found is not None and (unknown := [each for each in eos_ids if each >= found.vocab_size]):
        problems.append(f"eos_token_id {unknown} are no ids of the tokenizer, which has {found.vocab_size}")
    return None if found is None or len(problems) > before else Carried(found, eos_ids, template, special)


def named_tokenizer(source: str) -> Tokenizer:
    """`--tokenizer`: "bytes", a file, or a folder with tokenizer.json. Raises DataError."""
    if source == "bytes":
        return Tokenizer.load("bytes")
    path = Path(source)
    return Tokenizer.load(path / "tokenizer.json" if path.is_dir() else path)


def _with_eod(table: dict, name: str | None, eos_ids: tuple[int, ...]) -> Tokenizer:
    """The end-of-document token is one of the known names, else `name`, else the first of `eos_ids`."""
    try:
        return JsonTokenizer(table, name="tokenizer.json")
    except DataError:
        if name is None and eos_ids:
            with suppress(Exception):  # the library raises plain Exception for what is no tokenizer
                name = tokenizers.Tokenizer.from_str(json.dumps(table)).id_to_token(eos_ids[0])
        if name is None:
            raise
    return JsonTokenizer(table, eod=name, name="tokenizer.json")


def _table(folder: Path, name: str, problems: list[str]) -> dict[str, Any]:
    table = read_json(folder, name, problems)
    if not isinstance(table, (dict, type(None))):
        problems.append(f"{name}: must hold a JSON object, got {type(table).__name__}")
    return table if isinstance(table, dict) else {}


def _library(folder: Path, family: str, problems: list[str]) -> dict | None:
    count = len(problems)
    table = _table(folder, "tokenizer.json", problems)
    if table or len(problems) > count:
        return table or None
    if family == "gpt2" and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _gpt2_table(folder, problems)
    other = " There is tokenizer.model of SentencePiece; transformers' save_pretrained makes tokenizer.json of it."
    problems.append(
        "tokenizer.json: missing; name one with --tokenizer." + other * (folder / "tokenizer.model").exists()
    )
    return None


def _gpt2_table(folder: Path, problems: list[str]) -> dict | None:
    """GPT-2's own vocab.json and merges.txt, with its pre-tokenizer, which is the library's ByteLevel."""
    vocabulary = _table(folder, "vocab.json", problems)
    if problem := file_problem(folder, "merges.txt"):
        problems.append(problem)
        return None
    with open(folder / "merges.txt", encoding="utf-8", errors="replace") as file:
        lines = file.read(MAX_JSON).splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        problems.append(f"vocab.json, merges.txt: not a byte-pair encoding: {error}")
        return None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    library.decoder = decoders.ByteLevel()
    if "<|endoftext|>" in vocabulary:
        library.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True, normalized=True)])
    return json.loads(library.to_str())


def _special(settings: dict[str, Any], where: str, problems: list[str]) -> dict[str, str]:
    """The texts of special tokens; what else is in tokenizer_config.json is said by tokenizer.json as well."""
    special: dict[str, str] = {}
    for key in _TOKENS:
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
        elif value is not None:
            problems.append(f"{where}: {key} must be the text of a token, got {settings[key]!r}")
    return special


def _ids(value: Any, vocab_size: int, problems: list[str]) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < vocab_size for each in ids):
        problems.append(f"eos_token_id must be token ids below {vocab_size}, got {value!r}")
        return ()
    return tuple(dict.fromkeys(ids))


def _template(folder: Path, settings: dict[str, Any], problems: list[str]) -> str | None:
    """chat_template.jinja, else `chat_template` of tokenizer_config.json: a text, or a list with one named default."""
    where, value = TOKENIZER_CONFIG, settings.get("chat_template")
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default", value)
    try:
        if problem := file_problem(folder, TEMPLATE_FILE):
            where = TEMPLATE_FILE
            raise ConfigError(problem.partition(": ")[2])
        if (path := folder / TEMPLATE_FILE).exists():
            where = TEMPLATE_FILE
            with open(path, encoding="utf-8") as file:
                value = file.read(LONGEST + 1)
        if not isinstance(value, (str, type(None))):
            raise ConfigError("chat_template must be a text, or a list with one named 'default'")
        if value is not None:
            ChatTemplate(value)  # refuses one that is too long, or no Jinja
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        problems.append(f"{where}: {error}")
        return None
    return value


# --- from a run ---


def from_run(run: Path) -> Carried:
    """Raises DataError or ConfigError: a file of the run is missing or not as it was written."""
    problems: list[str] = []
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    special = _special(_table(run, SPECIAL_FILE, problems), SPECIAL_FILE, problems)
    eos_ids = _ids(_table(run, GENERATION_FILE, problems).get("eos_token_ids"), tokenizer.vocab_size, problems)
    template = _template(run, {}, problems)
    if problems:
        raise ConfigError(f"{run}: " + "; ".join(problems))
    return Carried(tokenizer, eos_ids, template, special)
