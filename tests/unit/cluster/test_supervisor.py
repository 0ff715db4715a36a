"""The supervisor with small Python processes in place of roles: restarts, refusals, draining, nothing left."""

from __future__ import annotations

import asyncio
import functools
import inspect
import io
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, cast

import psutil
import pytest
from rich.console import Console

from kvrelay.cluster.child import Child, ProcessSpec, _Pipe
from kvrelay.cluster.display import Display
from kvrelay.cluster.supervisor import Supervisor
from kvrelay.config.cluster_config import ClusterSettings
from kvrelay.config.faults import FaultsConfig

P = ParamSpec("P")
SETTINGS = ClusterSettings(restart_backoff_s=0.5, restart_backoff_max_s=3.0, drain_timeout_s=20.0)

SAY_READY = """
import os
os.write(int(os.environ["KVRELAY_STAGES_FD"]), b"loading\\nready\\n")
"""
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"no\\n"))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("grandchild", child.pid, flush=True)
while True: signal.pause()
"""
POLITE = """
import os, signal, sys
def end(*_):
    os.write(1, b"finished\\n")  # print may be what the signal interrupts
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("running", flush=True)
while True: signal.pause()
"""


def in_loop(test: Callable[P, Coroutine[object, object, None]]) -> Callable[P, None]:
    """Run an async test on a loop of its own."""

    @functools.wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        asyncio.run(test(*arguments, **named))

    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    del run.__wrapped__  # pytest would take the test for a coroutine function
    return run


def spec(name: str, code: str, role: str = "decode") -> ProcessSpec:
    return ProcessSpec(name, role, (sys.executable, "-c", code))


def killed_by(number: signal.Signals) -> str:
    """Return the code of a process that ends as if its own code were at fault, without a core file."""
    return f"""
import os, resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.kill(os.getpid(), {int(number)})
signal.pause()
"""


class Screen(Display):
    """Keeps what is shown, and tells who waits for a line."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()), [])
        self.stages: list[str] = []
        self.lines: list[str] = []
        self._changed = asyncio.Event()

    def line(self, name: str, line: str) -> None:
        self._add(f"{name}: {line}")

    def stage(self, name: str, stage: str) -> None:
        self.stages.append(f"{name}: {stage}")
        self._changed.set()

    async def wait_for_stage(self, stage: str) -> None:
        while stage not in self.stages:
            self._changed.clear()
            await self._changed.wait()

    def say(self, text: str) -> None:
        self._add(text)

    def warn(self, text: str) -> None:
        self._add(text)

    async def wait_for(self, start: str, count: int = 1) -> list[str]:
        while len(found := [line for line in self.lines if line.startswith(start)]) < count:
            self._changed.clear()
            await self._changed.wait()
        return found

    def _add(self, line: str) -> None:
        self.lines.append(line)
        self._changed.set()


class Time:
    """Restarts wait on this: no time passes but what they wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.waits.append(delay_s)
        self.now_s += delay_s
        await asyncio.sleep(0)


class TimeWith(Time):
    """No restart comes before ``screen`` shows ``line``."""

    def __init__(self, screen: Screen, line: str) -> None:
        super().__init__()
        self._screen = screen
        self._line = line

    async def sleep(self, delay_s: float) -> None:
        await self._screen.wait_for(self._line)
        await super().sleep(delay_s)


async def ready() -> str | None:
    return None


async def not_yet() -> str | None:
    await asyncio.Event().wait()
    return None


async def nothing() -> None:
    return None


def supervisor_of(
    *specs: ProcessSpec,
    screen: Screen,
    time: Time,
    probe: Callable[[], Awaitable[str | None]] = ready,
    on_ready: Callable[[], Awaitable[None]] = nothing,
) -> Supervisor:
    return Supervisor(specs, SETTINGS, screen, probe=probe, on_ready=on_ready, now=time.now, sleep=time.sleep)


@in_loop
async def test_a_crashed_process_is_started_again_later_and_later() -> None:
    screen, time = Screen(), Time()
    supervisor = supervisor_of(spec("d0", SAY_READY + "raise SystemExit(7)"), screen=screen, time=time)
    running = asyncio.create_task(supervisor.run(os.environ))

    shown = await screen.wait_for("d0 exited with 7; restarting it", count=4)
    supervisor.stop()

    assert await running == 0
    assert shown[:4] == [f"d0 exited with 7; restarting it in {wait} s" for wait in ("0.5", "1", "2", "3")]
    assert time.waits[:4] == [0.5, 1.0, 2.0, 3.0]


@in_loop
async def test_a_killed_process_is_started_again() -> None:
    screen = Screen()
    supervisor = supervisor_of(
        spec("d0", SAY_READY + "print(os.getpid(), flush=True)\n" + POLITE), screen=screen, time=Time()
    )
    running = asyncio.create_task(supervisor.run(os.environ))

    await screen.wait_for("d0: running")
    pid = next(line for line in screen.lines if line.removeprefix("d0: ").isdecimal())
    os.kill(int(pid.removeprefix("d0: ")), signal.SIGKILL)
    await screen.wait_for("d0: running", count=2)
    supervisor.stop()

    assert await running == 0
    (line,) = await screen.wait_for("d0 was killed by SIGKILL")
    assert "if memory ran out" in line
    assert line.endswith("; restarting it in 0.5 s")


@pytest.mark.parametrize("role", ["decode", "router"])
@in_loop
async def test_a_process_that_was_told_to_end_by_others_is_started_again(role: str) -> None:
    """Drained, or by a signal: only the supervisor's own stop is for good."""
    screen = Screen()
    supervisor = supervisor_of(
        spec("it", SAY_READY + "print(os.getpid(), flush=True)\n" + POLITE, role),
        spec("d1", POLITE),
        screen=screen,
        time=Time(),
    )
    running = asyncio.create_task(supervisor.run(os.environ))

    await screen.wait_for("it: running")
    pid = next(line for line in screen.lines if line.removeprefix("it: ").isdecimal())
    os.kill(int(pid.removeprefix("it: ")), signal.SIGTERM)
    await screen.wait_for("it exited with 0; restarting it in 0.5 s")
    await screen.wait_for("it: running", count=2)
    assert not running.done()
    supervisor.stop()

    assert await running == 0


@in_loop
async def test_a_process_that_cannot_be_started_is_tried_again_and_ends_the_cluster() -> None:
    screen, time = Screen(), Time()
    supervisor = supervisor_of(
        ProcessSpec("d0", "decode", ("/nowhere/python",)), spec("d1", POLITE), screen=screen, time=time
    )

    assert await supervisor.run(os.environ) == 1
    found = await screen.wait_for("d0 cannot be started: ", count=3)
    assert len(found) == 3
    assert "No such file" in found[0]
    assert time.waits == [0.5, 1.0]


@in_loop
async def test_a_process_that_an_operator_stopped_stays_down() -> None:
    screen = Screen()
    supervisor = supervisor_of(
        spec("d0", SAY_READY + "raise SystemExit(3)"), spec("d1", POLITE), screen=screen, time=Time()
    )
    running = asyncio.create_task(supervisor.run(os.environ))

    await screen.wait_for("d0 exited with 3; not restarting it")
    await screen.wait_for("d1: running")
    assert not running.done()
    supervisor.stop()

    assert await running == 0


@pytest.mark.parametrize("when", ["starting", "serving"])
@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV])
@in_loop
async def test_a_process_killed_by_its_own_fault_again_and_again_ends_the_cluster(
    number: signal.Signals, when: str
) -> None:
    """The others are ended well, and the last words name the process, the signal and the likely cause."""
    screen = Screen()
    time = TimeWith(screen, "d1: running")
    faulty = spec("d0", (SAY_READY if when == "serving" else "") + killed_by(number))

    async def probe() -> str | None:
        await screen.wait_for("d1: running")
        return await (ready() if when == "serving" else not_yet())

    code = await supervisor_of(faulty, spec("d1", POLITE), screen=screen, time=time, probe=probe).run(os.environ)

    assert code == 1
    *again, last = await screen.wait_for(f"d0 was killed by {number.name} (")
    assert [line.rpartition("; ")[2] for line in again] == [f"restarting it in {wait} s" for wait in ("0.5", "1")]
    assert last.endswith("; crash 3 in a row, not restarting it")
    assert {signal.SIGILL: "lacks an instruction", signal.SIGSEGV: "native code"}[number] in last
    assert "d1: finished" in screen.lines


@in_loop
async def test_a_process_that_never_gets_ready_ends_the_cluster() -> None:
    screen = Screen()
    supervisor = supervisor_of(spec("d0", "raise SystemExit(1)"), screen=screen, time=Time(), probe=not_yet)

    assert await supervisor.run(os.environ) == 1
    assert "d0 exited with 1; crash 3 in a row, not restarting it" in screen.lines


@in_loop
async def test_a_refused_process_is_not_started_again_once_the_cluster_served() -> None:
    screen = Screen()

    async def on_ready() -> None:
        screen.say("up")

    async def probe() -> str | None:
        await screen.wait_for("d1: running")
        return None

    gate = Path(os.environ["XDG_RUNTIME_DIR"]) / "gate"
    os.mkfifo(gate)
    d0 = ProcessSpec("d0", "decode", (sys.executable, "-c", f"open({str(gate)!r}).read(); raise SystemExit(2)"))
    supervisor = supervisor_of(d0, spec("d1", POLITE), screen=screen, time=Time(), probe=probe, on_ready=on_ready)
    running = asyncio.create_task(supervisor.run(os.environ))

    await screen.wait_for("up")
    await asyncio.to_thread(gate.write_text, "open")
    await screen.wait_for("d0 exited with 2; not restarting it")
    gate.unlink()
    assert not running.done()
    supervisor.stop()

    assert await running == 0
    assert "d1: finished" in screen.lines


@in_loop
async def test_a_process_refused_at_the_start_ends_the_cluster_with_2() -> None:
    screen = Screen()

    d0, d1 = spec("d0", "raise SystemExit(2)"), spec("d1", POLITE)
    code = await supervisor_of(d0, d1, screen=screen, time=Time(), probe=not_yet).run(os.environ)

    assert code == 2
    assert "d0 cannot run with this config" in screen.lines


REFUSED = """
import sys
sys.stderr.write("a library says something\\n")
sys.stderr.write('{"time": "t", "level": "info", "process": "d0", "event": "stopped"}\\n')
sys.stderr.write("2026-11-27T20:00:00.000Z INFO d0 stopped\\n")
sys.stderr.write("nodes.d0.port: taken\\n  since long\\n\\nnodes.d0.cpus: no such CPU\\n")
raise SystemExit(2)
"""


@pytest.mark.parametrize("was_ready", [False, True])
@in_loop
async def test_the_warning_about_a_refused_process_has_its_reasons(was_ready: bool) -> None:
    """In a log of JSON objects they are else only in lines of level info."""
    screen = Screen()
    warning = "d0 cannot run with this config: nodes.d0.port: taken; since long; nodes.d0.cpus: no such CPU"
    is_up = asyncio.Event()

    async def probe() -> str | None:
        return None if was_ready else await not_yet()

    async def on_ready() -> None:
        is_up.set()

    gate = Path(os.environ["XDG_RUNTIME_DIR"]) / "gate"
    os.mkfifo(gate)
    d0 = spec("d0", f"open({str(gate)!r}).read()" + REFUSED)
    supervisor = supervisor_of(d0, spec("d1", POLITE), screen=screen, time=Time(), probe=probe, on_ready=on_ready)
    running = asyncio.create_task(supervisor.run(os.environ))

    if was_ready:
        await is_up.wait()
    await asyncio.to_thread(gate.write_text, "open")
    await screen.wait_for(warning)
    gate.unlink()
    supervisor.stop()

    assert await running == (0 if was_ready else 2)
    assert screen.lines.count(warning) == 1


@in_loop
async def test_a_cluster_that_never_serves_is_given_up_with_the_reason() -> None:
    screen = Screen()

    async def never() -> str | None:
        return "no decode node"

    code = await supervisor_of(spec("d0", POLITE), screen=screen, time=Time(), probe=never).run(os.environ)

    assert code == 1
    assert "not ready after 600 s: no decode node" in screen.lines


@in_loop
async def test_stages_of_a_start_are_shown_and_who_is_not_ready_is_named() -> None:
    screen, time = Screen(), Time()

    async def probe() -> str | None:
        await screen.wait_for_stage("d0: ready")
        await screen.wait_for_stage("p0: loading")
        if any(line.startswith("waiting for ") for line in screen.lines):
            await not_yet()
        return "no prefill node"

    loading = SAY_READY.replace("ready", "loading")
    d0, p0 = spec("d0", SAY_READY + POLITE), spec("p0", loading + POLITE, "prefill")
    supervisor = supervisor_of(d0, p0, screen=screen, time=time, probe=probe)
    running = asyncio.create_task(supervisor.run(os.environ))
    await screen.wait_for("waiting for ")
    for name in ("d0", "p0"):
        await screen.wait_for(f"{name}: running")
    supervisor.stop()

    assert await running == 0
    assert {line for line in screen.lines if line.startswith("waiting")} == {"waiting for p0 (loading)"}
    assert [stage for stage in screen.stages if stage.startswith("d0")] == ["d0: loading", "d0: ready"]


@in_loop
async def test_nodes_are_drained_after_the_router() -> None:
    screen = Screen()
    supervisor = supervisor_of(
        spec("p0", POLITE, "prefill"), spec("d0", POLITE), spec("router", POLITE, "router"), screen=screen, time=Time()
    )
    running = asyncio.create_task(supervisor.run(os.environ))
    for name in ("router", "p0", "d0"):
        await screen.wait_for(f"{name}: running")

    supervisor.stop()

    assert await running == 0
    finished = [line for line in screen.lines if line.endswith("finished")]
    assert finished[0] == "router: finished"
    assert sorted(finished[1:]) == ["d0: finished", "p0: finished"]
    assert screen.lines[-1] == "all processes have ended"


@in_loop
async def test_a_second_stop_kills_with_all_they_started_who_will_not_end() -> None:
    screen = Screen()
    time = Time()
    supervisor = supervisor_of(spec("d0", STUBBORN), screen=screen, time=time)
    running = asyncio.create_task(supervisor.run(os.environ))
    (line,) = await screen.wait_for("d0: grandchild")

    supervisor.stop()
    time.now_s += 0.9
    supervisor.stop()  # timeout(1) signals the process, and then its group
    await screen.wait_for("d0: no")
    assert not running.done()
    time.now_s += 0.2
    supervisor.stop()

    assert await running == 0
    assert "killing d0" in screen.lines
    assert gone(int(line.split()[-1]))


@in_loop
async def test_what_a_crashed_process_had_started_ends_with_it() -> None:
    screen = Screen()
    crash = STUBBORN.replace("while True: signal.pause()", "raise SystemExit(5)")
    time = Time()
    supervisor = supervisor_of(spec("d0", crash), screen=screen, time=time)
    running = asyncio.create_task(supervisor.run(os.environ))

    (line, *_) = await screen.wait_for("d0: grandchild", count=2)
    assert gone(int(line.split()[-1]))
    supervisor.stop()
    time.now_s += 1.1
    supervisor.stop()
    assert await running == 0


def test_signals_to_a_process_that_has_just_ended_leave_its_exit_status_to_who_waits_for_it() -> None:
    async def signal_it() -> None:
        output, stages = _Pipe(), _Pipe()
        child = Child(cast(Any, process), output, stages, print, print)
        for act in (child.pause, child.resume, child.terminate):
            act()
        for pipe in (output, stages):
            os.close(pipe.write_end)
        await asyncio.gather(*child._readers)

    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        asyncio.run(signal_it())
        assert process.returncode is None
    assert process.returncode == 2


def test_nothing_outlives_a_killed_supervisor() -> None:
    script = f"""
import asyncio, sys
sys.path[:0] = {sys.path!r}
from kvrelay.cluster.child import Child, ProcessSpec
async def main():
    sleeper = ProcessSpec("d0", "decode", (sys.executable, "-c", "import time; time.sleep(600)"))
    child = await Child.start(sleeper, {{}}, print, print)
    print("child", child._process.pid, flush=True)
    await child.wait()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        child = psutil.Process(int(supervisor.stdout.readline().split()[-1]))
        supervisor.kill()
    assert not psutil.wait_procs([child], timeout=60)[1]


def gone(pid: int) -> bool:
    """Tell whether a process ends; one that is killed takes a moment to be reaped."""
    try:
        return not psutil.wait_procs([psutil.Process(pid)], timeout=60)[1]
    except psutil.NoSuchProcess:
        return True


@in_loop
async def test_a_process_is_stopped_now_and_then_if_the_config_wants_it() -> None:
    """It continues by itself, and when it is told to end while it is stopped."""
    faulty = replace(spec("d0", POLITE), faults=FaultsConfig(stop_every_s=0.01, stop_s=0.01))
    screen = Screen()
    supervisor = supervisor_of(faulty, screen=screen, time=RealTime())
    running = asyncio.create_task(supervisor.run(os.environ))
    await screen.wait_for("FAULTS ARE INJECTED ON PURPOSE in d0")
    await screen.wait_for("d0: running")
    await screen.wait_for("faults: d0 is stopped for 0.01 s", count=5)
    supervisor.stop()
    assert await running == 0
    assert "d0: finished" in screen.lines


class RealTime(Time):
    """Waits as long as it is told."""

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
