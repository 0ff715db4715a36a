"""Batches to train on: chats with the loss on their answers, and random tokens that repeat."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from demo_model.dialogue import Message, Mix, training_dialogue
from demo_model.tokenizer import ASSISTANT, END, SPECIAL_TOKENS, render, token_id

IGNORED = -100

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """One answer in a batch: predicted at positions ``start`` to ``stop - 1`` of ``row``."""

    row: int
    start: int
    stop: int
    task: str


@dataclass(frozen=True)
class Batch:
    """Token ids and targets, both [rows, length]; a target is IGNORED where there is no loss."""

    tokens: Ids
    targets: Ids
    answers: list[Answer]


class Batches:
    """A seeded source of batches."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._end, self._assistant = token_id(tokenizer, END), token_id(tokenizer, ASSISTANT)

    def chats(self, mix: Mix, rows: int) -> Batch:
        """``rows`` chats, padded at the end to the longest."""
        chats = [training_dialogue(self._rng, mix) for _ in range(rows)]
        encoded = self._tokenizer.encode_batch([render(chat) for chat in chats], add_special_tokens=False)
        length = max(len(encoding.ids) for encoding in encoded)
        tokens = np.full((rows, length), self._end)
        targets = np.full((rows, length), IGNORED)
        answers: list[Answer] = []
        for row, (chat, encoding) in enumerate(zip(chats, encoded, strict=True)):
            tokens[row, : len(encoding.ids)] = encoding.ids
            answers += self._mark_answers(row, chat, encoding.ids, targets[row])
        return Batch(tokens, targets, answers)

    def copies(self, rows: int, length: int = 96, longest: int = 40) -> Batch:
        """Random tokens, each row a piece of its own length repeated to the end."""
        tokens = np.empty((rows, length), dtype=np.int64)
        targets = np.full((rows, length), IGNORED)
        for row in range(rows):
            period = int(self._numbers.integers(4, longest))
            piece = self._numbers.integers(len(SPECIAL_TOKENS), self._tokenizer.get_vocab_size(), period)
            tokens[row] = np.resize(piece, length)
            targets[row, period:-1] = tokens[row, period + 1 :]
        return Batch(tokens, targets, [Answer(row, longest, length - 1, "copy") for row in range(rows)])

    def _mark_answers(self, row: int, chat: list[Message], ids: list[int], targets: Ids) -> list[Answer]:
        starts = [i for i, token in enumerate(ids) if token == self._assistant]
        said = [message["content"] for message in chat if message["role"] == "assistant"]
        answers = []
        for start, text in zip(starts, said, strict=True):
            stop = ids.index(self._end, start)
            targets[start:stop] = ids[start + 1 : stop + 1]
            answers.append(Answer(row, start, stop, task_of(text)))
        return answers


def task_of(answer: str) -> str:
    """What an answer shows, told from its form."""
    if answer.endswith("was not mentioned."):
        return "unknown"
    if answer.startswith("Number of"):
        return "count"
    if answer.startswith("The ") and answer.count(".") == 1:
        return "where"
    return "repeat" if answer.startswith("The ") else "talk"
