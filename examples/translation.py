"""A translation model: a made-up language, sentences that it has never seen, and how many come out word for word.

    python examples/translation.py            # minutes on two cores
    megakern chat examples/out/translation/run

Veshi is made by the grammar below. Against English: the verb comes first and carries the tense, nouns carry number and
case, adjectives follow their noun and agree with it in number, and articles are endings. The model sees 8,000 pairs of
several million; the held-out ones are judged.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.shared import arguments, learn, write_lines

NOUNS = {
    "dog": "kal", "cat": "miru", "bird": "tesh", "king": "orun", "child": "pavi", "tree": "dolm",
    "river": "sheva", "house": "brik", "friend": "luno", "teacher": "ghent", "horse": "rask", "baker": "wumi",
}  # fmt: skip
PLURALS = {"child": "children"}
ADJECTIVES = {
    "red": "zar", "small": "piki", "old": "hodu", "happy": "fela", "quiet": "nesh", "tall": "urt", "wise": "omla",
    "green": "vint",
}  # fmt: skip
VERBS = {
    "sees": ("saw", "see", "gat"), "loves": ("loved", "love", "amun"), "follows": ("followed", "follow", "trek"),
    "helps": ("helped", "help", "yob"), "finds": ("found", "find", "diso"), "paints": ("painted", "paint", "kluf"),
}  # fmt: skip


def noun_phrase(draw: random.Random, case: str) -> tuple[str, str, bool]:
    """(English, Veshi, plural?)."""
    noun, plural, definite = draw.choice(list(NOUNS)), draw.random() < 0.5, draw.random() < 0.5
    adjectives = draw.sample(list(ADJECTIVES), draw.choice((0, 1, 1, 2)))
    words = [*adjectives, PLURALS.get(noun, noun + "s") if plural else noun]
    article = "the" if definite else "some" if plural else "an" if words[0][0] in "aeiou" else "a"
    ending = ("im" if plural else "") + case + ("ta" if definite else "")
    veshi = [NOUNS[noun] + ending, *(ADJECTIVES[each] + ("im" if plural else "") for each in adjectives)]
    return " ".join([article, *words]), " ".join(veshi), plural


def sentence(draw: random.Random) -> tuple[str, str]:
    """English and Veshi."""
    who, veshi_who, plural = noun_phrase(draw, "")
    whom, veshi_whom, _ = noun_phrase(draw, "en")
    singular = draw.choice(list(VERBS))
    past, bare, stem = VERBS[singular]
    in_past = draw.random() < 0.5
    english = f"{who} {past if in_past else bare if plural else singular} {whom}"
    return english, f"{stem}{'ol' if in_past else 'a'} {veshi_who} {veshi_whom}"


def main() -> None:
    options = arguments(__doc__, "translation")
    draw = random.Random(1)
    pairs = dict(sentence(draw) for _ in range(200 if options.short else 8000))
    lines = write_lines(options.out / "pairs.jsonl", ({"prompt": a, "response": b} for a, b in pairs.items()))
    run = learn(options, lines, Path(__file__).with_suffix(".toml"), longest=65, answers=300)
    print(f"\nit translates to Veshi: megakern chat {run}")


if __name__ == "__main__":
    main()
