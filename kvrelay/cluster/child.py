"""One process of a cluster, with the processes it starts."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from kvrelay.config.faults import FaultsConfig
from kvrelay.runtime.listening import LISTENER_FD
from kvrelay.runtime.parent import end_with_parent
from kvrelay.runtime.startup import READY, STAGES_FD

_MAX_LINE_BYTES = 1 << 16


OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to start. ``name`` is unique in the cluster.

    ``listener``: the descriptor of a socket it listens at. ``faults``: of these, its supervisor stops it.
    """

    name: str
    role: str
    argv: tuple[str, ...]
    listener: int | None = None
    faults: FaultsConfig = field(default_factory=FaultsConfig, hash=False)


class _Pipe:
    """A pipe from a child to its parent."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()


class Child:
    """A running process, the leader of a process group of its own.

    The kernel kills it when this process ends, however that happens; a terminal's Ctrl-C does not reach it.
    """

    def __init__(self, process: Process, output: _Pipe, stages: _Pipe, on_line: OnText, on_stage: OnText) -> None:
        self._process = process
        self._on_stage = on_stage
        self._readers = [
            asyncio.create_task(_read_lines(output.read_end, on_line)),
            asyncio.create_task(_read_lines(stages.read_end, self._take_stage)),
        ]
        self.was_ready = False
        """Whether it has reported that it is ready."""

    @classmethod
    async def start(cls, spec: ProcessSpec, env: Mapping[str, str], on_line: OnText, on_stage: OnText) -> Child:
        """Start ``spec`` in ``env``.

        Every line it or its own children write goes to ``on_line``, each stage of its start to ``on_stage``.
        """
        output, stages = _Pipe(), _Pipe()
        descriptors = {STAGES_FD: stages.write_end}
        if spec.listener is not None:
            descriptors[LISTENER_FD] = spec.listener
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.argv,
                env={**env, **{name: str(descriptor) for name, descriptor in descriptors.items()}},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.write_end,
                stderr=output.write_end,
                pass_fds=list(descriptors.values()),
                process_group=0,
                preexec_fn=end_with_parent,
            )
        except OSError:
            os.close(output.read_end)
            os.close(stages.read_end)
            raise
        finally:
            os.close(output.write_end)
            os.close(stages.write_end)
        return cls(process, output, stages, on_line, on_stage)

    async def wait(self) -> int:
        """Return the exit code (negative: the signal that ended it) once nothing of the process group is left."""
        code = await self._process.wait()
        self.kill()
        await asyncio.gather(*self._readers)
        return code

    def _take_stage(self, stage: str) -> None:
        self.was_ready |= stage == READY
        self._on_stage(stage)

    def terminate(self) -> None:
        """Send SIGTERM. The process drains, and stops its own children."""
        self._signal(signal.SIGTERM)
        self.resume()  # a stopped process would not notice

    def pause(self) -> None:
        """Send SIGSTOP to the process, but not to those it started."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT to the process."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """Send ``number``, unless the process is known to have ended.

        Not by asyncio: in many versions of Python, its ``send_signal`` takes the exit status of a process that has
        just ended from whoever waits for it, who then gets 255.
        """
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill the process and all processes it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


async def _read_lines(fd: int, on_line: OnText) -> None:
    """Pass on the lines from ``fd`` until its last writer closes it. Overlong lines are cut."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb"))
    rest = b""
    try:
        while data := await reader.read(_MAX_LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                on_line(line.decode("utf-8", "replace").rstrip())
        if rest:
            on_line(rest.decode("utf-8", "replace").rstrip())
    finally:
        transport.close()
