"""Ask the committed model held-out questions through kvrelay's own engine, and count the right answers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from demo_model.answering import Answerer
from demo_model.questions import FILLING_TASKS, TASKS, Question, ask

LENGTHS = (100, 250, 500, 1000, 2000)
OTHER_LENGTH = 500
OVERALL_BAR, CELL_BAR = 0.98, 0.95
BATCH = 8
SPARE_TOKENS = 8  # a wrong answer may run so much longer than the right one


@dataclass(frozen=True)
class Cell:
    """Questions of one task in chats of one length, and how many were answered right."""

    task: str
    max_tokens: int
    num_right: int
    num_asked: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num_asked


def check(model_dir: Path, seed: int, per_cell: int, threads: int) -> bool:
    """Print accuracy by task and context length; return whether it meets both bars."""
    answerer = Answerer(model_dir, BATCH, threads)
    try:
        cells = [_ask_cell(answerer, seed, per_cell, task, length) for task, length in _cells()]
    finally:
        answerer.close()
    print(table(cells))
    overall = sum(cell.num_right for cell in cells) / sum(cell.num_asked for cell in cells)
    lowest = min(cells, key=lambda cell: cell.accuracy)
    print(
        f"\noverall {overall:.2%} (bar {OVERALL_BAR:.0%}), lowest {lowest.accuracy:.1%} in "
        f"{lowest.task} at {lowest.max_tokens} (bar {CELL_BAR:.0%}); seed {seed}, {per_cell} questions a cell"
    )
    return overall >= OVERALL_BAR and lowest.accuracy >= CELL_BAR


def table(cells: list[Cell]) -> str:
    """Accuracy in per cent as a Markdown table: a row for each task, a column for each length in tokens."""
    lines = [
        "| task | " + " | ".join(f"{length} tokens" for length in LENGTHS) + " |",
        "|---" * (1 + len(LENGTHS)) + "|",
    ]
    for task in TASKS:
        found = {cell.max_tokens: f"{cell.accuracy:.1%}" for cell in cells if cell.task == task}
        lines.append(f"| {task} | " + " | ".join(found.get(length, "") for length in LENGTHS) + " |")
    return "\n".join(lines)


def _cells() -> list[tuple[str, int]]:
    return [(task, length) for task in TASKS for length in (LENGTHS if task in FILLING_TASKS else (OTHER_LENGTH,))]


def _ask_cell(answerer: Answerer, seed: int, per_cell: int, task: str, max_tokens: int) -> Cell:
    rng = Random(f"check {seed} {task} {max_tokens}")
    asked = [ask(rng, task, max_tokens) for _ in range(per_cell)]
    num_right = 0
    for first in range(0, per_cell, BATCH):
        part = asked[first : first + BATCH]
        given = answerer.answers([question.messages for question in part], [_room(question) for question in part])
        for question, answer in zip(part, given, strict=True):
            num_right += answer == question.answer
            if answer != question.answer:
                print(f"{task} at {max_tokens}: {question.messages[-1]['content'][-60:]!r}", file=sys.stderr)
                print(f"    said {answer!r}, right is {question.answer!r}", file=sys.stderr)
    return Cell(task, max_tokens, num_right, per_cell)


def _room(question: Question) -> int:
    return len(question.answer.encode()) + SPARE_TOKENS  # no answer has more tokens than bytes
