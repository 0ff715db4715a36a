"""One worker process, as the router has it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress

import msgspec

from router.workers.channel import MAX_UNSENT_BYTES, Channel
from router.workers.link import WorkerLink
from router.workers.messages import FromWorker, Start, Stop, ToWorker

MakeLink = Callable[[Callable[[ToWorker], None]], WorkerLink]
"""Makes the link of a worker from what sends messages to it."""


EXIT_TIMEOUT_S = 2.0
"""Seconds a process may take to exit when it has closed its channel."""


class Worker:
    """A process, the channel to it, and its link."""

    def __init__(self, process: Process, make_link: MakeLink) -> None:
        self._process = process
        self.link = make_link(self.send)
        self._channel = Channel(FromWorker, self.link.receive)

    @classmethod
    async def start(cls, start: Start, listener: socket.socket, make_link: MakeLink) -> Worker:
        """Start a process that will accept from ``listener``. Raises OSError if the system cannot."""
        own, its = socket.socketpair()
        descriptors = its.fileno(), listener.fileno()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # the working directory may have a package of the same name
                "-m",
                "router.workers",
                *map(str, descriptors),
                stdin=PIPE,
                pass_fds=descriptors,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        except OSError:
            own.close()
            raise
        finally:
            its.close()
        worker = cls(process, make_link)
        await worker._channel.open(own)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(start))
        process.stdin.close()
        return worker

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        """Send ``message``. A worker that has not read the last ``MAX_UNSENT_BYTES`` is killed."""
        if self._channel.num_unsent_bytes > MAX_UNSENT_BYTES:
            self.kill()
        self._channel.send(message)

    def stop(self) -> None:
        """Ask it to accept nothing more, to finish and to end; the second time, to end at once."""
        self.send(Stop())

    def kill(self) -> None:
        """Kill the process."""
        if self._process.returncode is None:
            self._process.kill()

    async def ended(self) -> int:
        """Return its exit status (negative: the signal that ended it) when its last message has been handled."""
        await self._channel.lost.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                return await self._process.wait()
        self.kill()
        return await self._process.wait()
