"""A process that sends completions: a job a line on standard input, what came of it a line on standard output.

Between the two it says that it is ready and waits for the moment at which the job begins, another line.
"""

from __future__ import annotations

import asyncio
import sys
import time

import msgspec
import uvloop
from support.completions import complete

from gpu_check.jobs import Answer, Ask, Done, Job
from gpu_check.stream_times import Stream


async def perform(job: Job, begin_s: float) -> list[Answer]:
    """Return the answers to ``job``, begun at ``begin_s`` by ``time.monotonic``."""

    async def ask(one: Ask) -> Answer:
        await asyncio.sleep(begin_s + one.at_s - time.monotonic())
        got = await complete(job.port, one.prompt, one.max_tokens, ignore_eos=True)
        return Answer(got.request_id, got.token_ids, Stream(got.sent_s, got.token_s, got.num_tokens))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(one)) for one in job.asks]
    return [task.result() for task in tasks]


def main() -> None:
    """Perform jobs until standard input ends."""
    output = open(1, "wb", closefd=False)  # noqa: SIM115 (PYTHONUNBUFFERED makes that of sys write only a part)
    for line in sys.stdin.buffer:
        job = msgspec.json.decode(line, type=Job)
        print("ready", flush=True)
        begin_s = float(sys.stdin.buffer.readline())
        try:
            done = Done(uvloop.run(perform(job, begin_s)))
        except* (RuntimeError, OSError) as errors:
            done = Done(error=repr(errors.exceptions[0]))
        output.write(msgspec.json.encode(done) + b"\n")
        output.flush()


if __name__ == "__main__":
    main()
