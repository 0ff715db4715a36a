"""Worker processes that prepare long bodies without blocking the event loop or holding the router's GIL."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import PreparationError, QueueFullError
from router.model import ServedModel
from router.openai import schemas
from router.openai.errors import AnswerError
from router.preparation import Job, Outcome, Preparation, PreparedRequest, TooLongForLoopError
from router.preparation_wire import (
    LENGTH,
    WORKER_SETTINGS,
    Answer,
    Generate,
    Refusal,
    decode_prompt,
    decode_reply,
    encode,
    framed,
)

_IDLE_S = 60.0
"""Seconds an idle worker is kept."""

_REUSE_BYTES = 1 << 20
"""A worker exits after a job with more bytes, because no allocator guarantees to return the memory otherwise."""

_WAITING_PER_WORKER = 8
"""Maximum bodies waiting per worker; further ones are answered 429."""

_PIECE_BYTES = 256 << 10


class Worker:
    """One worker process with one job at a time. A caller that gives up before the reply must kill it."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, settings: bytes) -> Worker:
        """Start a worker. ``settings``: JSON of the config's sections ``model`` and ``engine``."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the working directory may have a package of the same name
            "-m",
            "router.preparation_worker",
            stdin=PIPE,
            stdout=PIPE,
            limit=_PIECE_BYTES,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
        )
        worker = cls(process)
        await worker._send(settings)
        return worker

    @property
    def is_alive(self) -> bool:
        """Whether the process is not known to have ended."""
        return self._process.returncode is None

    async def exchange(self, message: bytes) -> bytes:
        """Return the reply to ``message``. Raises OSError or EOFError if the process dies."""
        await self._send(message)
        assert self._process.stdout is not None
        head = await self._process.stdout.readexactly(LENGTH.size)
        return await self._process.stdout.readexactly(*LENGTH.unpack(head))

    def kill(self) -> None:
        """Kill the process."""
        if self.is_alive:
            self._process.kill()

    async def end(self, *, kill: bool) -> None:
        """Close its input and wait until the process has ended, with ``kill`` at once, else after its current job."""
        if kill:
            self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.communicate()

    async def _send(self, message: bytes) -> None:
        """Send ``message`` in pieces: a pipe holds 64 KiB, and asyncio copies what does not fit."""
        assert self._process.stdin is not None
        whole = memoryview(framed(message))
        for start in range(0, len(whole), _PIECE_BYTES):
            self._process.stdin.write(whole[start : start + _PIECE_BYTES])
            await self._process.stdin.drain()


class WorkerDiedError(PreparationError):
    """The worker ended before it replied."""


class PreparationPool:
    """At most ``router.preparation_workers`` workers, started on demand and ended when idle."""

    def __init__(self, config: ClusterConfig) -> None:
        self._settings = config.model_dump_json(include=WORKER_SETTINGS).encode()
        self._timeout_s = config.router.preparation_timeout_s
        self._num_workers = config.router.preparation_workers
        self._free = asyncio.Semaphore(self._num_workers)
        self._num_jobs = 0
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._is_closed = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def run(self, message: bytes) -> bytes:
        """Return a worker's reply to ``message``.

        Raises QueueFullError if too many jobs wait, PreparationError if the worker died or timed out. Cancellation
        ends the worker.
        """
        if self._num_jobs >= self._num_workers * (1 + _WAITING_PER_WORKER):
            raise QueueFullError("too many long requests are being prepared")
        self._num_jobs += 1
        try:
            async with self._free:
                return await self._run(message)
        finally:
            self._num_jobs -= 1

    async def close(self) -> None:
        """End all workers. Running and later jobs fail with PreparationError."""
        self._is_closed = True
        self._end_idle()
        for worker in list(self._busy):
            worker.kill()
        while self._ending:
            await asyncio.gather(*self._ending)

    async def _run(self, message: bytes) -> bytes:
        kept = self._take_idle()
        if kept is not None:
            try:
                return await self._exchange(kept, message)
            except WorkerDiedError:  # it may have died while idle, which this job did not cause
                pass
        return await self._exchange(await Worker.start(self._settings), message)

    async def _exchange(self, worker: Worker, message: bytes) -> bytes:
        """Return the reply of ``worker``, which is idle or ended afterwards."""
        self._busy.add(worker)
        if self._is_closed:
            worker.kill()
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await worker.exchange(message)
        except BaseException as error:  # includes cancellation: nothing waits for the reply any more
            self._end(worker, kill=True)
            if isinstance(error, TimeoutError):
                raise PreparationError(f"the request was not prepared within {self._timeout_s:g} s") from None
            if isinstance(error, OSError | EOFError):
                raise WorkerDiedError("the process that prepared the request died") from None
            raise
        finally:
            self._busy.discard(worker)
        self._put_back(worker, len(message) + len(reply))
        return reply

    def _take_idle(self) -> Worker | None:
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            self._end(worker, kill=False)
        return None

    def _put_back(self, worker: Worker, num_bytes: int) -> None:
        if num_bytes > _REUSE_BYTES or self._is_closed:
            self._end(worker, kill=False)
            return
        self._idle.append(worker)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = asyncio.get_running_loop().call_later(_IDLE_S, self._end_idle)

    def _end_idle(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        while self._idle:
            self._end(self._idle.pop(), kill=False)

    def _end(self, worker: Worker, *, kill: bool) -> None:
        task = asyncio.get_running_loop().create_task(worker.end(kill=kill))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class Preparer:
    """Prepares short bodies on the event loop and others in a worker."""

    def __init__(self, config: ClusterConfig, model: ServedModel) -> None:
        self._preparation = Preparation(model)
        self._pool = PreparationPool(config)
        self.apis = self._preparation.apis

    def prepare_now(self, job: Job) -> Outcome | None:
        """Return the outcome of a short body, None for others. Raises as ``Preparation.prepare``."""
        try:
            return self._preparation.prepare_inline(job)
        except TooLongForLoopError:
            return None

    async def prepare_in_worker(self, job: Job) -> Outcome:
        """Return the outcome. Raises as ``PreparationPool.run``, and AnswerError if the body is refused."""
        reply = decode_reply(await self._pool.run(encode(job)))
        schemas.unknown_fields.notice(reply.unknown_fields)
        match reply.outcome:
            case Answer(body=body):
                return body
            case Refusal(error=error, param=param):
                raise AnswerError(error, param=param)
            case Generate() as generate:
                return await self._prepared(job, generate)

    async def close(self) -> None:
        """End all workers."""
        await self._pool.close()

    async def _prepared(self, job: Job, reply: Generate) -> PreparedRequest:
        request = self.apis[job.task].schema.model_validate_json(reply.request)
        if reply.structure is not None:
            self._preparation.known_grammars.add(reply.structure.grammar)
        prompts: Sequence[list[int]] = [await _decoded(prompt) for prompt in reply.prompts]
        return PreparedRequest(request, prompts, reply.texts, reply.structure, reply.echo, reply.rules)


async def _decoded(prompt: bytes) -> list[int]:
    """Decode one prompt, after yielding to the loop, because all prompts together may be as long as the body."""
    await asyncio.sleep(0)
    return decode_prompt(prompt)
