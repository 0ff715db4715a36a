"""The world the demo model talks about: objects, where they are, and what the right answers are.

``questions`` is what tests and the check ask; ``dialogue`` makes the longer chats that training reads.
Everything is drawn from a ``random.Random`` that the caller seeds.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, field
from random import Random

from demo_model.vocabulary import (
    ADJECTIVES,
    CORRECTION_LEADS,
    COUNTED,
    FALLBACK,
    HOW_MANY_QUESTION,
    KINDS,
    MOST_COUNTED,
    NOT_MENTIONED,
    NUMBERS,
    PLACES,
    PLAIN_VERB,
    PLURALS,
    SMALL_TALK,
    WHERE_QUESTIONS,
)


@dataclass(frozen=True)
class Thing:
    """What a fact is about: "red key", or "key" if the adjective is empty."""

    adjective: str
    kind: str

    def __str__(self) -> str:
        return f"{self.adjective} {self.kind}".lstrip()


@dataclass(frozen=True)
class Spot:
    """Where a thing is: "lies in box 417"."""

    verb: str
    preposition: str
    place: str
    number: int

    def __str__(self) -> str:
        return f"{self.verb} {self.preposition} {self.place} {self.number}"

    def changed(self) -> str:
        """The same with a "now": "now lies in box 417", "is now in box 417"."""
        verb = f"{self.verb} now" if self.verb == PLAIN_VERB else f"now {self.verb}"
        return f"{verb} {self.preposition} {self.place} {self.number}"


def random_spot(rng: Random) -> Spot:
    """Any place; every third time with the plain verb ("is in box 3")."""
    verb, preposition, place = rng.choice(PLACES)
    number = rng.randint(1000, 99999) if rng.random() < 0.02 else rng.choice(NUMBERS)
    return Spot(PLAIN_VERB if rng.random() < 1 / 3 else verb, preposition, place, number)


def random_things(rng: Random, count: int) -> list[Thing]:
    """``count`` different things of few kinds or many, some kinds with more things than others."""
    fewest = math.ceil(count / 12)
    most = min(count, len(KINDS))
    kinds = rng.sample(KINDS, round(math.exp(rng.uniform(math.log(fewest), math.log(most)))))
    weights = [rng.uniform(0.1, 1.0) ** 2 for _ in kinds]
    things: dict[Thing, None] = {}
    while len(things) < count:
        adjective = rng.choice(ADJECTIVES) if rng.random() < 0.95 else ""
        things[Thing(adjective, rng.choices(kinds, weights)[0])] = None
    return list(things)


def invented_word(rng: Random) -> str:
    """A word that the tokenizer does not know and spells in bytes."""
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 7)))


def gibberish(rng: Random) -> str:
    """A sentence of unknown words, at times with marks and characters from anywhere in Unicode."""
    spoken = [invented_word(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        spoken.append(rng.choice("🙂🎉é漢яß€→"))
    return " ".join(spoken).capitalize() + rng.choice(".!?,;")


@dataclass
class Notebook:
    """The truth: where everything is after all that was told."""

    spots: dict[Thing, Spot] = field(default_factory=dict)
    uncountable: set[str] = field(default_factory=set)
    """Kinds with a thing that was told again as if for the first time, or that is named by an unknown word."""

    def tell(self, rng: Random, thing: Thing, unmarked: float = 0.0) -> str:
        """Put ``thing`` somewhere and return the sentence that says so; a thing that has a place gets a new one.

        The share ``unmarked`` of new places is told as if for the first time.
        """
        is_known = thing in self.spots
        self.spots[thing] = spot = random_spot(rng)
        if thing.adjective not in ("", *ADJECTIVES):
            self.uncountable.add(thing.kind)
        if not is_known:
            return f"The {thing} {spot}."
        where = spot.changed() if rng.random() < 0.4 else str(spot)
        if rng.random() < unmarked:
            self.uncountable.add(thing.kind)
            return f"The {thing} {where}."
        return f"{rng.choice(CORRECTION_LEADS)} {thing} {where}."

    def where(self, thing: Thing) -> str:
        """The right answer to "Where is ...?"."""
        spot = self.spots.get(thing)
        return NOT_MENTIONED.format(thing) if spot is None else f"The {thing} {spot}."

    def count(self, kind: str) -> int:
        """Things of ``kind`` that were told; a thing that was moved counts once."""
        return sum(thing.kind == kind for thing in self.spots)

    def kinds(self) -> list[str]:
        """The kinds that were told and can be counted, in the order of their first things."""
        told = dict.fromkeys(thing.kind for thing in self.spots)
        return [kind for kind in told if kind in PLURALS and kind not in self.uncountable]

    def how_many(self, kind: str) -> str:
        """The right answer to "How many ... did I mention?"."""
        count = self.count(kind)
        return COUNTED.format(PLURALS[kind], count if count <= MOST_COUNTED else "many")


def where_question(rng: Random, thing: Thing) -> str:
    """One of the ways to ask where ``thing`` is."""
    return carelessly(rng, rng.choice(WHERE_QUESTIONS).format(thing))


def how_many_question(rng: Random, kind: str) -> str:
    """The way to ask how many things of ``kind`` were told."""
    return carelessly(rng, HOW_MANY_QUESTION.format(PLURALS[kind]))


def carelessly(rng: Random, said: str) -> str:
    """``said`` as people type it: at times without its last mark, or without its capital."""
    if rng.random() < 0.1:
        said = said.rstrip("?!.")
    return said[0].lower() + said[1:] if rng.random() < 0.1 else said


def unknown_thing(rng: Random, notebook: Notebook) -> Thing:
    """A thing that was not told; mostly one whose adjective and kind were told of other things."""
    told = list(notebook.spots)
    while True:
        chance = rng.random()
        if chance < 0.05:
            thing = Thing(rng.choice(ADJECTIVES), invented_word(rng))
        elif told and chance < 0.8:
            thing = Thing(rng.choice(told).adjective, rng.choice(told).kind)
        else:
            thing = Thing(rng.choice(ADJECTIVES), rng.choice(KINDS))
        if thing not in notebook.spots:
            return thing


def kind_to_count(rng: Random, notebook: Notebook, most: int | None = None) -> str:
    """A kind that was told, of at most ``most`` things; every number of things is as likely as any other."""
    counts = {kind: notebook.count(kind) for kind in notebook.kinds()}
    wanted = rng.choice(sorted({count for count in counts.values() if most is None or count <= most}) or [0])
    return rng.choice([kind for kind, count in counts.items() if count == wanted] or list(KINDS))


def small_talk(rng: Random) -> tuple[str, str]:
    """Something said that is no fact and no question about one, and the answer to it."""
    if rng.random() < 0.3:
        return gibberish(rng), FALLBACK
    said = rng.choice(list(SMALL_TALK))
    return carelessly(rng, said), SMALL_TALK[said]
