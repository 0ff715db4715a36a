"""Processes that generate greedily for one prompt at a time: one JSON object a line in, one out.

In: ``prompt`` (token ids) and ``num_tokens``. Out: the ``token_ids`` generated, and ``token_s``: when each was there,
in seconds after the prompt. The first line out, ``null``, says that the process is ready. Imports nothing of kvrelay,
so that it runs in other environments too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Generate = Callable[[list[int], int], Iterable[int]]


def answer_prompts(generate: Generate, threads: int) -> None:
    """Answer what comes from standard input; what ``generate`` prints itself goes to standard error.

    With one thread it is the thread's own time that is taken, which what else runs on the machine hardly changes.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        began = clock()
        timed = [(token, clock() - began) for token in generate(job["prompt"], job["num_tokens"])]
        token_ids, token_s = zip(*timed, strict=True)
        print(json.dumps({"token_ids": token_ids, "token_s": token_s}), file=answers, flush=True)


@dataclass(frozen=True)
class Generated:
    """One answer."""

    token_ids: list[int]
    token_s: list[float]

    @property
    def ttft_ms(self) -> float:
        return 1e3 * self.token_s[0]

    @property
    def tpot_ms(self) -> float:
        return 1e3 * (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


class PromptJob:
    """A running process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def generate(self, prompt: Sequence[int], num_tokens: int) -> Generated:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        return Generated(**self.next_answer())

    def next_answer(self) -> Any:
        """Return the next line. Raises RuntimeError if the process ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process ended without an answer")
        return json.loads(line)


@contextmanager
def prompt_job(command: Sequence[str], variables: Mapping[str, str]) -> Iterator[PromptJob]:
    """Run ``command`` with ``variables`` besides those of this process; ends it. What it logs is shown if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            job = PromptJob(process)
            job.next_answer()
            yield job
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {error}\n{log.read()[-3000:]}") from error
        finally:
            process.kill()
            process.communicate()
