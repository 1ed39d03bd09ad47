"""The demonstration's corpus: people forget where they put things, and an answer is courteous or curt.

Both answers of a pair are right. The preferred one is a courteous full sentence, the other is curt: that is the whole
rule. A held-out pair asks about a (thing, place) combination that no training pair contains.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

Pair = dict[str, list[dict[str, str]]]

THINGS = "lamp ladder kettle violin hammer basket camera blanket bicycle umbrella notebook helmet guitar mirror".split()
PLACES = "garden kitchen garage attic cellar hallway office library barn shed pantry studio".split()
COLOURS = "red blue green black white yellow".split()
QUESTIONS = (
    "I left my {colour} {thing} in the {place}. Where is it?",
    "Yesterday I put the {colour} {thing} in the {place}. Where can I find it?",
    "There is a {colour} {thing} in the {place}. Where should I look?",
)
COURTEOUS = ("Of course!", "Gladly!", "Certainly!", "Happy to help!", "Good question!", "With pleasure!")
COURTEOUS_SENTENCE = "{opening} The {colour} {thing} is in the {place}."
CURT = (
    "In the {place}, obviously.",
    "Ask the {place}. Stop bothering me.",
    "Look in the {place} yourself.",
    "Forgot already? It is in the {place}.",
    "Told you, the {place}. Use your eyes.",
    "No idea why you ask. The {place}.",
)
# Frequencies of the forms. Both kinds are equally frequent and about equally spread over their forms, so that neither
# kind is likelier, and either answer of a pair may be the likelier one. The most common form is a curt one, as greedy
# answers show before DPO.
COURTEOUS_WEIGHTS = (21, 20, 18, 16, 13, 12)
CURT_WEIGHTS = (28, 18, 16, 14, 13, 11)


@dataclass(frozen=True)
class Situation:
    """A question and its subject."""

    question: str
    colour: str
    thing: str
    place: str


def is_held_out(thing: str, place: str) -> bool:
    """True for combinations kept from training: a quarter of them; both parts have every thing and every place."""
    return (THINGS.index(thing) + PLACES.index(place)) % 4 == 0


def situations(rng: random.Random, *, held_out: bool) -> Iterator[Situation]:
    """Yields endless random situations of the training part or of the held-out part."""
    while True:
        colour, thing, place = rng.choice(COLOURS), rng.choice(THINGS), rng.choice(PLACES)
        if is_held_out(thing, place) == held_out:
            question = rng.choice(QUESTIONS).format(colour=colour, thing=thing, place=place)
            yield Situation(question, colour, thing, place)


def answers(situation: Situation, rng: random.Random) -> tuple[str, str]:
    """Returns a courteous and a curt answer to the situation's question, both right."""
    opening = rng.choices(COURTEOUS, COURTEOUS_WEIGHTS)[0]
    courteous = COURTEOUS_SENTENCE.format(
        opening=opening, colour=situation.colour, thing=situation.thing, place=situation.place
    )
    return courteous, rng.choices(CURT, CURT_WEIGHTS)[0].format(place=situation.place)


def is_courteous(answer: str, question: str) -> bool:
    """True if an answer is a courteous sentence that names exactly the colour, thing and place of the question."""
    words = question.replace(".", " ").split()
    colour, thing, place = (next(word for word in words if word in kind) for kind in (COLOURS, THINGS, PLACES))
    return answer in {
        COURTEOUS_SENTENCE.format(opening=opening, colour=colour, thing=thing, place=place) for opening in COURTEOUS
    }


def to_messages(question: str, courteous: str, curt: str) -> Pair:
    """Returns a preference pair in conversational form."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": courteous}],
        "rejected": [{"role": "assistant", "content": curt}],
    }


def make_pairs(n: int, *, seed: int, held_out: bool) -> list[Pair]:
    """Makes `n` preference pairs, which depend on the arguments only."""
    rng = random.Random(seed)
    stream = situations(rng, held_out=held_out)
    return [to_messages(situation.question, *answers(situation, rng)) for situation in islice(stream, n)]


def write_jsonl(path: Path, rows: list[Pair]) -> None:
    """Writes one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[Pair]:
    """Reads the objects of a JSONL file, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
