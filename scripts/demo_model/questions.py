"""Held-out questions: one chat each that ends in a question, with the one right answer.

    for messages, answer, task in questions(seed=7, count=200, max_tokens=2000): ...

Needs nothing but the standard library. Training draws from ``dialogue`` and other seeds; no chat here is seen there but
by chance, for every fact is drawn from 36 adjectives, 36 kinds, 16 ways to be somewhere and 999 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from demo_model.facts import (
    Notebook,
    Thing,
    gibberish,
    how_many_question,
    kind_to_count,
    random_things,
    small_talk,
    unknown_thing,
    where_question,
)
from demo_model.vocabulary import ACKNOWLEDGEMENT, MOST_COUNTED

_FACT_TOKENS = 8
_MOST_NOISE = 72  # tokens: three facts and a long sentence of unknown words
_QUESTION_TOKENS = 48  # the question with everything around it, and room for the answer
_TURN_TOKENS = 8


class Question(NamedTuple):
    """A chat whose last message asks, the right answer to it, and what it takes to give it."""

    messages: list[dict[str, str]]
    answer: str
    task: str


def questions(seed: int, count: int, max_tokens: int, tasks: tuple[str, ...] = ()) -> list[Question]:
    """``count`` questions, the tasks in turn, each with its answer in at most ``max_tokens`` tokens.

    Those about facts fill between half of ``max_tokens`` and all of it. Raises ValueError below 100 tokens.
    """
    if max_tokens < 100:
        raise ValueError(f"max_tokens {max_tokens}: a chat with a few facts needs 100")
    rng = Random(f"demo {seed}")
    tasks = tasks or tuple(TASKS)
    return [
        ask(rng, tasks[index % len(tasks)], rng.randint(max(100, max_tokens // 2), max_tokens))
        for index in range(count)
    ]


def ask(rng: Random, task: str, max_tokens: int) -> Question:
    """A question of ``task``, a key of TASKS, that nearly fills ``max_tokens``."""
    messages, answer = TASKS[task](rng, max_tokens - _QUESTION_TOKENS)
    return Question(messages, answer, task)


Chat = tuple[list[dict[str, str]], str]


def _recall(rng: Random, room: int) -> Chat:
    notebook = Notebook()
    told = _tell(rng, notebook, random_things(rng, room // _FACT_TOKENS))
    thing = rng.choice(list(notebook.spots))
    return _user(f"{told} {where_question(rng, thing)}"), notebook.where(thing)


def _recall_in_noise(rng: Random, room: int) -> Chat:
    notebook = Notebook()
    noise: list[str] = []
    while not noise or room > _MOST_NOISE:
        noise.append(gibberish(rng))
        room -= 3 * _FACT_TOKENS + len(f" {noise[-1]}".encode())
    sentences = [notebook.tell(rng, thing) for thing in random_things(rng, 3 * len(noise))]
    for sentence in noise:
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    thing = rng.choice(list(notebook.spots))
    return _user(f"{' '.join(sentences)} {where_question(rng, thing)}"), notebook.where(thing)


def _recall_over_turns(rng: Random, room: int) -> Chat:
    notebook, turns = Notebook(), _num_turns(rng, room)
    messages = _tell_in_turns(rng, notebook, random_things(rng, (room - turns * _TURN_TOKENS) // _FACT_TOKENS), turns)
    thing = rng.choice(list(notebook.spots))
    return messages + _user(where_question(rng, thing)), notebook.where(thing)


def _corrected(rng: Random, room: int) -> Chat:
    """One to ten things are told again, in the last turn before the question."""
    notebook, turns = Notebook(), _num_turns(rng, room)
    num_things = (room - (turns + 1) * _TURN_TOKENS) // _FACT_TOKENS
    changed = rng.randint(1, min(10, num_things // 3))
    things = random_things(rng, num_things - 2 * changed)
    messages = _tell_in_turns(rng, notebook, things, turns)
    again = rng.sample(things, changed)
    messages += _told(_tell(rng, notebook, again))
    thing = rng.choice(again)
    return messages + _user(where_question(rng, thing)), notebook.where(thing)


def _unknown(rng: Random, room: int) -> Chat:
    notebook = Notebook()
    told = _tell(rng, notebook, random_things(rng, room // _FACT_TOKENS))
    thing = unknown_thing(rng, notebook)
    return _user(f"{told} {where_question(rng, thing)}"), notebook.where(thing)


def _count(rng: Random, room: int) -> Chat:
    notebook = Notebook()
    told = _tell(rng, notebook, random_things(rng, room // _FACT_TOKENS))
    kind = kind_to_count(rng, notebook, MOST_COUNTED)
    return _user(f"{told} {how_many_question(rng, kind)}"), notebook.how_many(kind)


def _talk(rng: Random, _: int) -> Chat:
    said, answer = small_talk(rng)
    return _user(said), answer


TASKS: dict[str, Callable[[Random, int], Chat]] = {
    "recall": _recall,
    "recall in noise": _recall_in_noise,
    "recall over turns": _recall_over_turns,
    "corrected": _corrected,
    "unknown": _unknown,
    "count": _count,
    "talk": _talk,
}
FILLING_TASKS = tuple(task for task in TASKS if task != "talk")
"""The tasks whose chats can be made as long as one likes."""


def _user(said: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": said}]


def _told(said: str) -> list[dict[str, str]]:
    return [*_user(said), {"role": "assistant", "content": ACKNOWLEDGEMENT}]


def _tell(rng: Random, notebook: Notebook, things: list[Thing]) -> str:
    return " ".join(notebook.tell(rng, thing) for thing in things)


def _num_turns(rng: Random, room: int) -> int:
    return rng.randint(1, min(5, room // (3 * _FACT_TOKENS) - 1) or 1)


def _tell_in_turns(rng: Random, notebook: Notebook, things: list[Thing], num_turns: int) -> list[dict[str, str]]:
    """``things`` told in ``num_turns`` messages of about equal length, each acknowledged."""
    messages = []
    for turn in range(num_turns):
        part = things[turn * len(things) // num_turns : (turn + 1) * len(things) // num_turns]
        messages += _told(_tell(rng, notebook, part)) if part else []
    return messages
