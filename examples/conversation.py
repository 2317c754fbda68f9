"""A conversation model: it is told facts, talks of other things, and is asked for the facts again.

    python examples/conversation.py           # minutes on two cores
    megakern chat examples/out/conversation/run

Names, towns and the rest are drawn anew for each of 6,000 made-up dialogues, so that an answer can only come from what
was said before. The held-out dialogues are other ones; every turn of the assistant in them is judged word for word.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.shared import arguments, learn, write_lines

SYLLABLES = ("ka", "lo", "mi", "ren", "sa", "tov", "ula", "ze", "bri", "dan", "fe", "gus")
NAMES = [(a + b).capitalize() for a in SYLLABLES[:8] for b in SYLLABLES[4:]]
TOWNS = [
    "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Quito", "Hanoi", "Accra",
    "Turin", "Perth", "Kyoto", "Bergen", "Dakar", "Sofia", "Riga", "Lyon",
]  # fmt: skip
PETS = ["dog", "cat", "parrot", "turtle", "rabbit", "goat", "hamster", "pony"]
JOBS = ["baker", "nurse", "pilot", "farmer", "singer", "judge", "plumber", "painter"]
FACTS = {
    "name": (NAMES, "My name is {}.", "Hello {}!", "What is my name?", "Your name is {}."),
    "town": (TOWNS, "I live in {}.", "{} is a nice place.", "Where do I live?", "You live in {}."),
    "pet": (PETS, "I have a {}.", "A {} is good company.", "What animal do I have?", "You have a {}."),
    "job": (JOBS, "I work as a {}.", "The work of a {} is never done.", "What do I do?", "You are a {}."),
}
SMALL_TALK = [
    ("How are you?", "I am well, thank you."),
    ("Tell me a joke.", "Two cores meet. One says: I am not threaded."),
    ("It rains.", "Then stay inside and talk to me."),
    ("Are you a person?", "No, I am a small model."),
]
UNKNOWN = "You have not told me."


def dialogue(draw: random.Random) -> dict:
    told = draw.sample(list(FACTS), draw.choice((1, 2, 2, 3)))
    values = {fact: draw.choice(FACTS[fact][0]) for fact in told}
    turns = [(FACTS[fact][1].format(values[fact]), FACTS[fact][2].format(values[fact])) for fact in told]
    turns.insert(draw.randint(0, len(turns)), draw.choice(SMALL_TALK))
    for fact in draw.sample(list(FACTS), 2):
        answer = FACTS[fact][4].format(values[fact]) if fact in values else UNKNOWN
        turns.append((FACTS[fact][3], answer))
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"messages": messages}


def main() -> None:
    options = arguments(__doc__, "conversation")
    draw = random.Random(1)
    count = 300 if options.short else 6000
    lines = write_lines(options.out / "talk.jsonl", (dialogue(draw) for _ in range(count)))
    run = learn(options, lines, Path(__file__).with_suffix(".toml"), longest=193, answers=600)
    print(f"\ntell it your name, talk of the rain, and ask: megakern chat {run}")


if __name__ == "__main__":
    main()
