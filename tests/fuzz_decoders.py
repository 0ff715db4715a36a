"""Gives every decoder inputs that nobody sends on purpose. See ``scripts/fuzz``.

``.venv/bin/python tests/fuzz_decoders.py [--minutes 10] [--seed N] [--only NAME] [--out DIR]``: all decoders of
``support/decoders.py`` get the same CPU time. It prints a line per decoder, writes each input that shows a new bug to
DIR, and ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support.decoders import Decoder, DecoderError, check, decoders, guarded
from support.mutations import Mutator

_SLICE_S = 0.1
_WARM_UP = 5
"""Rounds over all decoders after which memory may not grow any more."""

MAX_GROWTH_BYTES = 256 << 20
"""What the process may have more at its peak in the end than after the warm-up: allocators and caches."""


class Course:
    """What one decoder was given."""

    def __init__(self, decoder: Decoder, seed: int) -> None:
        self.decoder = decoder
        self.counts: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.failures: dict[str, tuple[bytes, str]] = {}
        """An input for each kind of failure, and what happened. Not the exception: its frames hold what was read."""
        self._mutator = Mutator(random.Random(seed), decoder.examples, decoder.notation, decoder.words)

    def run(self, inputs: Iterator[bytes]) -> None:
        """Give it ``inputs`` for a slice of CPU time, and at least one."""
        ends_s = time.process_time() + _SLICE_S
        for data in inputs:
            begin_s = time.thread_time()
            try:
                self.counts["accepted" if check(self.decoder, data) else "refused"] += 1
            except DecoderError as error:
                self.counts["failed"] += 1
                self.failures.setdefault(error.kind, (error.data, str(error)))
            self.slowest_s = max(self.slowest_s, time.thread_time() - begin_s)
            if time.process_time() > ends_s:
                return

    def mutated(self) -> Iterator[bytes]:
        while True:
            yield self._mutator.next()

    def __str__(self) -> str:
        counts = " ".join(f"{self.counts[name]:9,} {name}" for name in ("accepted", "refused", "failed"))
        return f"{self.decoder.name:32} {counts}   slowest {self.slowest_s * 1000:6.0f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="decoders whose names contain this")
    parser.add_argument("--out", type=Path, default=Path("fuzz"))
    arguments = parser.parse_args()
    logging.getLogger().addHandler(logging.NullHandler())
    print(f"decoders, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kvf-", dir="/dev/shm") as directory, guarded():
        courses = [
            Course(decoder, arguments.seed) for decoder in decoders(Path(directory)) if arguments.only in decoder.name
        ]
        grown = _run(courses, 60 * arguments.minutes)
    for course in courses:
        print(course)
    failures = [failure for course in courses for failure in course.failures.values()]
    for number, (data, what) in enumerate(failures):
        arguments.out.mkdir(exist_ok=True)
        (arguments.out / f"input-{number}").write_bytes(data)
        print(f"{arguments.out}/input-{number}: {what:.600}")
    total = sum(sum(course.counts.values()) for course in courses)
    print(f"{total:,} inputs, {len(failures)} bugs, memory at its peak {grown >> 20:,} MiB above the warm-up's")
    return 1 if failures or grown > MAX_GROWTH_BYTES else 0


def _run(courses: list[Course], seconds: float) -> int:
    """Give all decoders the same time, until ``seconds`` are over; return by how many bytes the peak has grown."""
    ends_s = time.monotonic() + seconds
    warm_bytes = 0
    for number in itertools.count():
        for course in courses:
            course.run(iter(course.decoder.examples) if number == 0 else course.mutated())
        if number <= _WARM_UP:
            warm_bytes = _peak_bytes()
        if time.monotonic() > ends_s:
            return _peak_bytes() - warm_bytes
    raise AssertionError("unreachable")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    sys.exit(main())
