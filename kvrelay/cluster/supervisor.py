"""Runs the processes of a cluster on this host, restarts them, and stops all of them together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from kvrelay.cluster.child import Child, ProcessSpec
from kvrelay.cluster.display import Display, is_log_line
from kvrelay.cluster.restarts import Life, RestartPolicy
from kvrelay.cluster.stops import stop_now_and_then
from kvrelay.config.cluster_config import ClusterSettings
from kvrelay.runtime.startup import READY
from kvrelay.runtime.stop_signals import StopRequests

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_REFUSED = 2
"""Exit status of a process that must not be restarted: invalid config, or refused by the router."""

EXIT_STOPPED = 3
"""Exit status of a node that an operator has told to end and to stay down."""

_PROBE_INTERVAL_S = 0.2
_GRACE_S = 5.0
"""Seconds after the drain timeout for a process to clean up."""

_MAX_LAST_WORDS = 20
"""Lines of a refused process that the supervisor's warning repeats."""


class Supervisor:
    """Starts ``specs``, restarts whatever ends without its order, and drains everything when told to stop.

    ``probe`` returns None when the cluster can serve, else the reason why not; ``on_ready`` then runs once. The
    router is stopped before the nodes, so that they finish what it still has. ``on_stopping`` runs first: nothing is
    started any more. ``now`` and ``sleep`` time the restarts.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        settings: ClusterSettings,
        display: Display,
        *,
        probe: Callable[[], Awaitable[str | None]],
        on_ready: Callable[[], Awaitable[None]],
        on_stopping: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._specs = specs
        self._settings = settings
        self._display = display
        self._probe = probe
        self._on_ready = on_ready
        self._on_stopping = on_stopping
        self._now = now
        self._sleep = sleep
        self._env: Mapping[str, str] = {}
        self._children: dict[str, Child] = {}
        self._starting: dict[str, str] = {}
        """Processes that are not ready, with their stage."""
        self._last_words: dict[str, deque[str]] = {}
        """What each process has written since its last log line: in the end, why it refuses its config."""
        self._stop_requests = StopRequests()
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()
        self._was_ready = False
        self._exit_code = EXIT_OK

    def stop(self) -> None:
        """End the cluster: let it finish what runs the first time, at once the second time.

        What comes within a second is the same request: ``timeout`` signals this process and then its group.
        """
        if not self._stop_requests.is_new(self._now()):
            return
        if self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def run(self, env: Mapping[str, str]) -> int:
        """Run the cluster in ``env`` until it is stopped or cannot go on; return the exit code.

        Nothing is left running.
        """
        self._env = env
        self._display.say(f"starting {', '.join(spec.name for spec in self._specs)}")
        faulty = [spec.name for spec in self._specs if spec.faults.is_active]
        if faulty:
            self._display.warn(f"FAULTS ARE INJECTED ON PURPOSE in {', '.join(faulty)}: see faults in the config")
        keepers = {spec: asyncio.create_task(self._keep(spec)) for spec in self._specs}
        bring_up = asyncio.create_task(self._bring_up())
        try:
            await self._stopping.wait()
            self._on_stopping()
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
                    self._end_cluster(EXIT_ERROR, f"not ready after {self._settings.start_timeout_s:g} s: {reason}")
                    return
                self._display.waiting_for(self._starting, reason, self._now())
                await self._sleep(_PROBE_INTERVAL_S)
            self._was_ready = True
            await self._on_ready()
        except Exception as error:  # last resort: the cluster ends with the reason
            self._end_cluster(EXIT_ERROR, f"{type(error).__name__}: {error}")

    async def _keep(self, spec: ProcessSpec) -> None:
        """Run ``spec`` and restart it until the cluster stops or the process is not restarted any more."""
        policy = RestartPolicy(self._settings)
        while not self._stopping.is_set():
            life = await self._live(spec)
            if self._stopping.is_set():
                return
            if life.code in (EXIT_REFUSED, EXIT_STOPPED):
                self._ended(spec, life)
                return
            delay_s = policy.delay_after(life)
            if delay_s is None:
                crashes = f"crash {policy.num_crashes} in a row"
                self._end_cluster(EXIT_ERROR, f"{spec.name} {life.ending}; {crashes}, not restarting it")
                return
            self._display.warn(f"{spec.name} {life.ending}; restarting it in {delay_s:g} s")
            await _first_of(self._sleep(delay_s), self._stopping.wait())

    async def _live(self, spec: ProcessSpec) -> Life:
        """Run ``spec`` once, until it ends."""
        started_s = self._now()
        self._starting[spec.name] = "starting"
        self._last_words[spec.name] = deque(maxlen=_MAX_LAST_WORDS)
        try:
            child = await Child.start(
                spec,
                self._env,
                lambda line: self._take_line(spec.name, line),
                lambda stage: self._take_stage(spec.name, stage),
            )
        except OSError as error:  # too many processes, no memory, an executable that is gone: maybe only now
            self._display.warn(f"{spec.name} cannot be started: {error}")
            return Life(EXIT_ERROR, self._now() - started_s, was_ready=False)
        self._children[spec.name] = child
        try:
            if self._hurrying.is_set():
                child.kill()
            elif self._stopping.is_set():
                child.terminate()
            stops = asyncio.create_task(
                stop_now_and_then(child, spec.name, spec.faults, self._display.warn, self._sleep)
            )
            code = await child.wait()
            stops.cancel()
            return Life(code, self._now() - started_s, child.was_ready)
        finally:
            del self._children[spec.name]
            self._display.ended(spec.name)

    def _take_line(self, name: str, line: str) -> None:
        if is_log_line(line):
            self._last_words[name].clear()
        else:
            self._last_words[name].append(line)
        self._display.line(name, line)

    def _take_stage(self, name: str, stage: str) -> None:
        self._starting[name] = stage
        if stage == READY:
            del self._starting[name]
        self._display.stage(name, stage)

    def _ended(self, spec: ProcessSpec, life: Life) -> None:
        """Handle a process that will not be restarted."""
        self._display.warn(f"{spec.name} {life.ending}; not restarting it")
        if life.code == EXIT_REFUSED:
            words = "; ".join(line.strip() for line in self._last_words[spec.name] if line)
            reason = f"{spec.name} cannot run with this config" + (f": {words}" if words else "")
            if not self._was_ready:
                self._end_cluster(EXIT_REFUSED, reason)
                return
            self._display.warn(reason)
        if spec.role == "router":
            self._end_cluster(life.code, "no cluster without its router")

    def _end_cluster(self, code: int, reason: str) -> None:
        self._display.warn(reason)
        self._exit_code = self._exit_code or code
        self._stopping.set()

    # ------------------------------------------------------------ down

    async def _drain(self, keepers: Mapping[ProcessSpec, asyncio.Task[None]]) -> None:
        limit_s = self._settings.drain_timeout_s
        self._display.say(f"draining, at most {limit_s:g} s; press Ctrl-C again to stop at once")
        deadline_s = self._now() + limit_s + _GRACE_S
        for is_router in (True, False):
            group = [spec for spec in keepers if (spec.role == "router") is is_router]
            for spec in group:
                if spec.name in self._children:
                    self._children[spec.name].terminate()
            await self._all_ended([keepers[spec] for spec in group], deadline_s)
        left = sorted(self._children)
        self._display.say(f"killing {', '.join(left)}" if left else "all processes have ended")

    async def _all_ended(self, tasks: Iterable[asyncio.Task[None]], deadline_s: float) -> None:
        """Wait for ``tasks`` until ``deadline_s`` or a second signal."""
        left_s = max(deadline_s - self._now(), _GRACE_S)
        await _first_of(_all(tasks), self._hurrying.wait(), asyncio.sleep(left_s))


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
