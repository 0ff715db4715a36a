"""What this process and those that send completions tell each other."""

from __future__ import annotations

import msgspec

from gpu_check.stream_times import Stream


class Ask(msgspec.Struct):
    """A greedy completion of so many tokens, sent ``at_s`` seconds after the job begins."""

    prompt: list[int]
    max_tokens: int
    at_s: float = 0.0


class Job(msgspec.Struct):
    """Completions to ask the router at ``port`` for."""

    port: int
    asks: list[Ask]


class Answer(msgspec.Struct):
    """One answer: the id of its request, its tokens and when they came."""

    request_id: str
    token_ids: list[int]
    stream: Stream


class Done(msgspec.Struct):
    """What came of a job: its answers in its order, or the first error."""

    answers: list[Answer] = msgspec.field(default_factory=list)
    error: str = ""
