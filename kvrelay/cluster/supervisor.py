"""Keeps the processes of a cluster running on this host, and ends all of them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from kvrelay.cluster.child import Child, ProcessSpec
from kvrelay.cluster.display import Display
from kvrelay.core.config import ClusterSettings

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_REFUSED = 2
"""What a process exits with when starting it again would change nothing: bad config, or refused by the router."""

_PROBE_INTERVAL_S = 0.2
_GRACE_S = 5.0
"""Seconds past the drain time-out that a process may take to clean up."""


class Backoff:
    """How long to wait before a crashed process is started again: twice as long each time, up to a limit."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = first_s

    def after(self, lived_s: float) -> float:
        """Return the wait after a life of ``lived_s``; one longer than the longest wait was no crash loop."""
        if lived_s > self._longest_s:
            self._next_s = self._first_s
        delay_s = min(self._next_s, self._longest_s)
        self._next_s = 2 * delay_s
        return delay_s


class Supervisor:
    """Starts ``specs``, restarts what crashes, and drains everything when told to stop.

    ``probe`` returns None when the cluster can serve, else the reason why not; ``on_ready`` then runs once. The
    router is stopped before the nodes, so that they finish what it still has. ``now`` and ``sleep`` time the restarts.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        settings: ClusterSettings,
        env: Mapping[str, str],
        display: Display,
        *,
        probe: Callable[[], Awaitable[str | None]],
        on_ready: Callable[[], Awaitable[None]],
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._specs = specs
        self._settings = settings
        self._env = dict(env)
        self._display = display
        self._probe = probe
        self._on_ready = on_ready
        self._now = now
        self._sleep = sleep
        self._children: dict[str, Child] = {}
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()
        self._was_ready = False
        self._exit_code = EXIT_OK

    def stop(self) -> None:
        """End the cluster: let it finish what runs the first time, at once the second time."""
        if self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def run(self) -> int:
        """Run the cluster until it is stopped or cannot go on; return the exit code. Nothing is left running."""
        keepers = {spec: asyncio.create_task(self._keep(spec)) for spec in self._specs}
        bring_up = asyncio.create_task(self._bring_up())
        try:
            await self._stopping.wait()
            await self._drain(keepers)
        finally:
            self._stopping.set()
            self._hurrying.set()
            bring_up.cancel()
            for child in self._children.values():
                child.kill()
            await asyncio.gather(*keepers.values(), bring_up, return_exceptions=True)
        return self._exit_code

    # ------------------------------------------------------------ up

    async def _bring_up(self) -> None:
        deadline_s = self._now() + self._settings.start_timeout_s
        try:
            while (reason := await self._probe()) is not None:
                if self._now() > deadline_s:
                    self._give_up(EXIT_ERROR, f"not ready after {self._settings.start_timeout_s:g} s: {reason}")
                    return
                await self._sleep(_PROBE_INTERVAL_S)
            self._was_ready = True
            await self._on_ready()
        except Exception as error:  # the border to whoever started the cluster: it ends, and says why
            self._give_up(EXIT_ERROR, f"{type(error).__name__}: {error}")

    async def _keep(self, spec: ProcessSpec) -> None:
        """Run ``spec`` again and again until the cluster stops or the process is done for good."""
        backoff = Backoff(self._settings.restart_backoff_s, self._settings.restart_backoff_max_s)
        while not self._stopping.is_set():
            started_s = self._now()
            code = await self._run_once(spec)
            if self._stopping.is_set():
                return
            if code in (EXIT_OK, EXIT_REFUSED):
                self._ended(spec, code)
                return
            delay_s = backoff.after(self._now() - started_s)
            self._display.warn(f"{spec.name} {_ending(code)}; starting it again in {delay_s:g} s")
            await _first_of(self._sleep(delay_s), self._stopping.wait())

    async def _run_once(self, spec: ProcessSpec) -> int:
        child = await Child.start(spec, self._env, lambda line: self._display.line(spec.name, line))
        self._children[spec.name] = child
        try:
            if self._hurrying.is_set():
                child.kill()
            elif self._stopping.is_set():
                child.terminate()
            return await child.wait()
        finally:
            del self._children[spec.name]

    def _ended(self, spec: ProcessSpec, code: int) -> None:
        """Take note of a process that will not be started again."""
        self._display.warn(f"{spec.name} {_ending(code)}; not starting it again")
        if code == EXIT_REFUSED and not self._was_ready:
            self._give_up(EXIT_REFUSED, f"{spec.name} cannot run as it is configured")
        elif spec.role == "router":
            self._give_up(code, "no cluster without its router")

    def _give_up(self, code: int, reason: str) -> None:
        self._display.warn(reason)
        self._exit_code = self._exit_code or code
        self._stopping.set()

    # ------------------------------------------------------------ down

    async def _drain(self, keepers: Mapping[ProcessSpec, asyncio.Task[None]]) -> None:
        limit_s = self._settings.drain_timeout_s
        self._display.say(f"finishing what runs, at most {limit_s:g} s; Ctrl-C again ends it at once")
        deadline_s = self._now() + limit_s + _GRACE_S
        for is_router in (True, False):
            group = [spec for spec in keepers if (spec.role == "router") is is_router]
            for spec in group:
                if spec.name in self._children:
                    self._children[spec.name].terminate()
            await self._all_ended([keepers[spec] for spec in group], deadline_s)
        left = sorted(self._children)
        self._display.say(f"killing {', '.join(left)}" if left else "everything has ended")

    async def _all_ended(self, tasks: Iterable[asyncio.Task[None]], deadline_s: float) -> None:
        """Wait for ``tasks``, not past ``deadline_s`` and not when hurried."""
        left_s = max(deadline_s - self._now(), _GRACE_S)
        await _first_of(_all(tasks), self._hurrying.wait(), asyncio.sleep(left_s))


def _ending(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"exited with {code}"


async def _all(tasks: Iterable[asyncio.Task[None]]) -> None:
    await asyncio.gather(*(asyncio.shield(task) for task in tasks))


async def _first_of(*waits: Awaitable[object]) -> None:
    """Wait until one of ``waits`` is over; cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
