"""Long chats for training: facts, corrections and talk over several turns, with a question in nearly every turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from demo_model.facts import (
    Notebook,
    Thing,
    gibberish,
    how_many_question,
    invented_word,
    random_things,
    small_talk,
    unknown_thing,
    where_question,
)
from demo_model.vocabulary import (
    ACKNOWLEDGEMENT,
    KINDS,
    MOST_COUNTED,
    MOST_REPEATED,
    OPENINGS,
    REPEAT_QUESTION,
    SYSTEM_PROMPTS,
)

Message = dict[str, str]
Turn = tuple[str, str]


@dataclass(frozen=True)
class Mix:
    """How a training chat is made up: its size, then shares per question and per chat."""

    num_facts: int = 4
    num_questions: int = 16
    unknown: float = 0.15
    count: float = 0.5
    talk: float = 0.04
    corrected: float = 0.7
    unmarked: float = 0.25
    noisy: float = 0.15
    invented: float = 0.15
    repeated: float = 0.5


@dataclass
class Dialogue:
    """A chat as it grows, and the truth of what was told in it."""

    rng: Random
    mix: Mix
    messages: list[Message] = field(default_factory=list)
    notebook: Notebook = field(default_factory=Notebook)
    sentences: list[str] = field(default_factory=list)
    corrected: list[Thing] = field(default_factory=list)
    counted: set[str] = field(default_factory=set)
    """Kinds asked for since the last fact: to ask again would only teach to copy the answer."""
    asked: set[Thing] = field(default_factory=set)
    """The same for things since they were last told."""

    def turn(self, turn: Turn) -> None:
        """One user message and its answer."""
        said, answer = turn
        self.messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]

    def tell(self, thing: Thing) -> str:
        """Tell or correct where ``thing`` is."""
        if thing in self.notebook.spots:
            self.corrected.append(thing)
        self.counted.clear()
        self.asked.discard(thing)
        self.sentences.append(self.notebook.tell(self.rng, thing, self.mix.unmarked))
        return self.sentences[-1]

    def question(self) -> Turn:
        """A question about the facts by the shares of the mix, and its right answer."""
        chance = self.rng.random()
        kinds = [kind for kind in KINDS if self._is_countable(kind)]
        if self.rng.random() < 0.9:  # none is soon learned, and not by counting
            kinds = [kind for kind in kinds if self.notebook.count(kind)]
        if chance < self.mix.count and kinds:
            kind = self._kind_to_count(kinds)
            return how_many_question(self.rng, kind), self.notebook.how_many(kind)
        thing = self._thing_to_ask_for(self.mix.count <= chance < self.mix.count + self.mix.unknown)
        return where_question(self.rng, thing), self.notebook.where(thing)

    def question_or_talk(self) -> Turn:
        """Mostly a question."""
        return small_talk(self.rng) if self.rng.random() < self.mix.talk else self.question()

    def repetition(self) -> Turn:
        """The wish to hear every fact again, and all of them."""
        return REPEAT_QUESTION, " ".join(self.sentences)

    def _is_countable(self, kind: str) -> bool:
        # One more than the most that is counted is left out: to tell the two apart would cost training most.
        return kind not in self.counted | self.notebook.uncountable and self.notebook.count(kind) != MOST_COUNTED + 1

    def _kind_to_count(self, kinds: list[str]) -> str:
        """One of ``kinds``, every number of things as likely as any other; marks it as counted."""
        wanted = self.rng.choice(sorted({self.notebook.count(kind) for kind in kinds}))
        kind = self.rng.choice([kind for kind in kinds if self.notebook.count(kind) == wanted])
        self.counted.add(kind)
        return kind

    def _thing_to_ask_for(self, unknown: bool) -> Thing:
        corrected = [thing for thing in self.corrected if thing not in self.asked]
        known = [thing for thing in self.notebook.spots if thing not in self.asked]
        if unknown or not known:
            return unknown_thing(self.rng, self.notebook)
        thing = self.rng.choice(corrected if corrected and self.rng.random() < 0.6 else known)
        if self.rng.random() < 0.9:
            self.asked.add(thing)
        return thing


def training_dialogue(rng: Random, mix: Mix) -> list[Message]:
    """A chat of about ``mix.num_facts`` facts and ``mix.num_questions`` questions."""
    chat = Dialogue(rng, mix)
    if rng.random() < 0.2:
        chat.messages.append({"role": "system", "content": _system_prompt(rng)})
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        chat.turn(rng.choice((chat.question, lambda: small_talk(rng)))())
    parts = _split(rng, _plan(rng, mix))
    is_spread = rng.random() < 0.5
    is_noisy = rng.random() < mix.noisy
    for index, things in enumerate(parts):
        asked = mix.num_questions // len(parts) if is_spread else 0
        if index == len(parts) - 1:
            asked = mix.num_questions - asked * index
        _tell_and_ask(chat, _paragraph(chat, things, is_noisy), asked)
    is_plain = len(parts) == 1 and not is_noisy and not chat.corrected
    if is_plain and len(chat.sentences) <= MOST_REPEATED and rng.random() < mix.repeated:
        chat.turn(chat.repetition())
    return chat.messages


def _tell_and_ask(chat: Dialogue, told: str, num_questions: int) -> None:
    """One turn that tells, then turns that ask; at times the first question rides with the facts."""
    ask: list[Callable[[], Turn]] = [chat.question_or_talk] * num_questions
    if num_questions and chat.rng.random() < 0.5:
        question, answer = chat.question()
        chat.turn((told + chat.rng.choice((" ", "\n", "\n\n")) + question, answer))
        ask.pop()
    else:
        chat.turn((told, ACKNOWLEDGEMENT))
    for next_turn in ask:
        chat.turn(next_turn())


def _paragraph(chat: Dialogue, things: list[Thing], is_noisy: bool) -> str:
    rng = chat.rng
    sentences = [rng.choice(OPENINGS)]
    for thing in things:
        sentences.append(chat.tell(thing))
        if is_noisy and rng.random() < 0.2:
            sentences.append(gibberish(rng))
    return rng.choice((" ", " ", " ", "\n")).join(filter(None, sentences))


def _plan(rng: Random, mix: Mix) -> list[Thing]:
    """The things in the order they are told; the ones that come again are corrections."""
    things = random_things(rng, mix.num_facts)
    if rng.random() < mix.invented:
        things = [_invent(rng, thing) if rng.random() < 0.1 else thing for thing in things]
    if rng.random() > mix.corrected:
        return things
    again = rng.choices(things, k=rng.randint(1, max(1, min(24, mix.num_facts // 2))))
    for thing in again:
        things.insert(rng.randint(things.index(thing) + 1, len(things)), thing)
    return things


def _invent(rng: Random, thing: Thing) -> Thing:
    if rng.random() < 0.5:
        return Thing(invented_word(rng), thing.kind)
    return Thing(thing.adjective, invented_word(rng))


def _split(rng: Random, things: list[Thing]) -> list[list[Thing]]:
    """Cut into one to six parts, none empty."""
    count = min(rng.choice((1, 1, 2, 3, 4, 6)), len(things))
    cuts = [0, *sorted(rng.sample(range(1, len(things)), count - 1)), len(things)]
    return [things[a:b] for a, b in pairwise(cuts)]


def _system_prompt(rng: Random) -> str:
    return rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.6 else gibberish(rng)
