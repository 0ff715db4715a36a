"""What parsers make of a model's output: parts, in the order in which the model wrote them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the user: the ``content`` of a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text before the answer that the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of the tool ``name`` begins. ``index`` counts the calls of an output from 0. Its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the arguments of call ``index``: all parts together are the text of a JSON object."""

    index: int
    text: str


Part: TypeAlias = Text | Reasoning | CallBegun | CallArguments


class Parser(Protocol):
    """Finds parts in one output. The parts, joined, do not depend on how the text is cut. The cost is linear.

    It never fails: what it does not understand is text.
    """

    def push(self, text: str) -> list[Part]:
        """Return what ``text`` completes. Text that may yet become something else is held back."""

    def finish(self) -> list[Part]:
        """Return what was held back, at the end of the output."""


@dataclass(slots=True)
class Call:
    """A whole call."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """All parts of an output, joined."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] | None = None


def joined(parts: Iterable[Part]) -> Message:
    """Return ``parts`` as one message. Text between calls comes together in ``content``."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[CallBegun, list[str]]] = []
    for part in parts:
        match part:
            case Text(text):
                texts.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallBegun():
                calls.append((part, []))
            case CallArguments(index, text):
                calls[index][1].append(text)
    whole = [Call(begun.call_id, begun.name, "".join(pieces)) for begun, pieces in calls]
    return Message("".join(texts), "".join(reasoning), whole or None)


def merged(parts: Iterable[Part]) -> list[Part]:
    """Return ``parts`` with neighbours of one kind joined."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        match last, part:
            case Text(before), Text(text):
                found[-1] = Text(before + text)
            case Reasoning(before), Reasoning(text):
                found[-1] = Reasoning(before + text)
            case (CallArguments(index, before), CallArguments(same, text)) if index == same:
                found[-1] = CallArguments(index, before + text)
            case _:
                found.append(part)
    return found
