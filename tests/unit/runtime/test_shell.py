"""The shell: events to the machine in order, actions out of it, timers, threads, endings."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from support.loops import PATIENCE_S, run

from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import (
    CancelTimer,
    Connect,
    Disconnect,
    Exit,
    Log,
    Machine,
    PeerLost,
    Received,
    Resumed,
    Send,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
)
from kvrelay.machine.liveness import PAUSE_S
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.router_to_node import Abort
from kvrelay.runtime.shell import Shell
from kvrelay.runtime.time_slice import MAX_TIME_SLICE_S
from kvrelay.runtime.transport import Transport


@dataclass(frozen=True)
class Work:
    """An action and an event of a role's own."""

    number: int


class Scripted:
    """A machine that answers each event by a function of it, and remembers what it was told."""

    def __init__(self, answer: Callable[[object, float], list[object]]) -> None:
        self.answer = answer
        self.events: list[object] = []

    def handle(self, event: object, now: float) -> list[object]:
        self.events.append(event)
        return self.answer(event, now)


def drive(
    machine: Machine,
    handlers: dict[type, Any] | None = None,
    meanwhile: Callable[[Shell], Any] = id,
    clock: Clock | None = None,
) -> str:
    async def main() -> str:
        shell = Shell(machine, clock=clock or Clock(), handlers=handlers)
        transport = Transport(PeerId("me#1"), shell.post)
        try:
            meanwhile(shell)
            return await shell.run(transport)
        finally:
            transport.close()

    return run(main())


def test_started_comes_first_and_exit_gives_its_reason() -> None:
    machine = Scripted(lambda event, now: [Exit("done")])
    assert drive(machine) == "done"
    assert machine.events == [Started()]


def test_actions_are_performed_in_order_up_to_the_last() -> None:
    performed: list[int] = []
    machine = Scripted(lambda event, now: [Work(1), Work(2), Exit(), Work(3)])
    drive(machine, {Work: lambda action: performed.append(action.number)})
    assert performed == [1, 2, 3]


def test_others_have_the_loop_between_the_actions_of_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count(step=MAX_TIME_SLICE_S)
    monkeypatch.setattr("kvrelay.runtime.shell.time", SimpleNamespace(monotonic=lambda: next(times)))
    happened: list[object] = []

    def answer(event: object, now: float) -> list[object]:
        happened.append(event)
        return [Exit(), Work(5)] if event == Work(2) else [Work(3), Work(4)] if event == Work(1) else []

    def perform(action: Work) -> None:
        happened.append(action.number)
        asyncio.get_running_loop().call_soon(happened.append, "others")

    drive(Scripted(answer), {Work: perform}, lambda shell: [*map(shell.post, [Work(1), Work(2)])])
    assert happened == [Started(), Work(1), 3, "others", 4, "others", Work(2), 5, "others"]


class StoppedClock(Clock):
    """A clock that jumps when told to, as for a process that was stopped, and else stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.paused_s = 0.0

    def now(self) -> float:
        return self.paused_s


@pytest.fixture
def pauses(no_pauses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have shells tell of pauses."""
    monkeypatch.setattr("kvrelay.machine.liveness.PAUSE_S", PAUSE_S)


@pytest.mark.usefixtures("pauses")
def test_after_a_pause_the_machine_is_told_first_and_timers_wait_until_messages_are_read() -> None:
    clock = StoppedClock()

    def answer(event: object, now: float) -> list[object]:
        match event:
            case Started():
                return [SetTimer("due meanwhile", now + 0.01), Work(0)]
            case TimerFired():
                return [Exit()]
            case _:
                return []

    def stop_for_a_while(_: Work) -> None:
        clock.paused_s = 7.0
        # What a socket had for this process while it was stopped is read a few turns of the loop later.
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, shells[0].post, Work(1))

    shells: list[Shell] = []
    machine = Scripted(answer)
    drive(machine, {Work: stop_for_a_while}, shells.append, clock)
    assert [type(event) for event in machine.events] == [Started, Resumed, Work, TimerFired]
    (resumed,) = [event for event in machine.events if isinstance(event, Resumed)]
    assert resumed.paused_s == 7.0


@pytest.mark.usefixtures("pauses")
def test_timers_fire_in_a_loop_that_is_always_slow() -> None:
    clock = StoppedClock()

    def answer(event: object, now: float) -> list[object]:
        match event:
            case Started():
                return [SetTimer("due", now + 0.06), Work(0)]
            case TimerFired():
                return [Exit("fired")]
            case Work(2):
                return [Exit("never fired")]
            case _:
                return []

    def be_slow(_: Work) -> None:
        def pause() -> None:
            clock.paused_s += PAUSE_S
            loop.call_later(0.04, pause)

        loop = asyncio.get_running_loop()
        loop.call_later(0.04, pause)
        loop.call_later(PATIENCE_S / 2, shells[0].post, Work(2))

    shells: list[Shell] = []
    assert drive(Scripted(answer), {Work: be_slow}, shells.append, clock) == "fired"


def test_an_event_posted_while_another_is_handled_waits_its_turn() -> None:
    handled: list[object] = []
    depth = 0

    def answer(event: object, now: float) -> list[object]:
        nonlocal depth
        assert depth == 0
        handled.append(event)
        if isinstance(event, Work):
            return [Exit()] if event.number == 3 else []
        return [Work(1), Work(2), Work(3)]

    def perform(action: Work) -> None:
        nonlocal depth
        depth += 1
        shells[0].post(action)
        depth -= 1

    shells: list[Shell] = []
    drive(Scripted(answer), {Work: perform}, shells.append)
    assert handled == [Started(), Work(1), Work(2), Work(3)]


class StandingClock(Clock):
    """However loaded the machine, no time passes between two actions, or two signals."""

    def now(self) -> float:
        return 0.0


def test_timers_fire_in_order_move_and_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.runtime.shell.time", SimpleNamespace(monotonic=lambda: 0.0))  # all are set in one turn
    fired: list[object] = []

    def answer(event: object, now: float) -> list[object]:
        match event:
            case Started():
                return [
                    SetTimer("late", now + 0.03),
                    SetTimer("early", now + 0.01),
                    SetTimer("moved", now + 0.001),
                    SetTimer("moved", now + 0.02),
                    SetTimer("never", now + 0.005),
                    CancelTimer("never"),
                    CancelTimer("unknown"),
                    SetTimer("past", now - 5),
                ]
            case TimerFired(key=key):
                fired.append(key)
                return [Exit()] if key == "late" else []
        raise AssertionError(event)

    drive(Scripted(answer), clock=StandingClock())
    assert fired == ["past", "early", "moved", "late"]


def test_a_timer_may_set_itself_again() -> None:
    machine = Scripted(lambda event, now: [Exit()] if len(machine.events) > 3 else [SetTimer("beat", now + 0.001)])
    drive(machine)
    assert machine.events == [Started(), *[TimerFired("beat")] * 3]


def test_now_never_goes_back() -> None:
    times: list[float] = []

    def answer(event: object, now: float) -> list[object]:
        times.append(now)
        return [Exit()] if len(times) > 50 else [SetTimer("again", now)]

    drive(Scripted(answer))
    assert times == sorted(times)


def test_events_from_other_threads_come_in() -> None:
    def post_from_threads(shell: Shell) -> None:
        for number in range(4):
            threading.Thread(target=lambda number=number: shell.post_threadsafe(Work(number))).start()

    machine = Scripted(lambda event, now: [Exit()] if len(machine.events) == 5 else [])
    drive(machine, meanwhile=post_from_threads)
    assert {event.number for event in machine.events if isinstance(event, Work)} == {0, 1, 2, 3}


def test_an_exception_in_handle_ends_the_run_and_is_logged_with_the_event(caplog: pytest.LogCaptureFixture) -> None:
    """By its types only: what it holds may be a prompt."""
    secret = "secret-4711"

    def answer(event: object, now: float) -> list[object]:
        if isinstance(event, Received):
            raise ValueError("a bug")
        return []

    message = Abort(request_id=RequestId(secret), epoch=1)
    with pytest.raises(ValueError, match="a bug"):
        drive(Scripted(answer), meanwhile=lambda shell: shell.post(Received(PeerId("p0#1"), message)))
    assert "error while handling Received(Abort)" in caplog.text
    assert secret not in caplog.text


def test_an_exception_in_an_action_ends_the_run_too() -> None:
    def perform(action: Work) -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        drive(Scripted(lambda event, now: [Work(1)]), {Work: perform})


def test_an_action_nobody_performs_is_a_bug() -> None:
    with pytest.raises(KeyError):
        drive(Scripted(lambda event, now: [Work(1)]))


def test_nothing_is_handled_after_the_end() -> None:
    def post_two(shell: Shell) -> None:
        shell.post(Work(1))
        shell.post(Work(2))

    machine = Scripted(lambda event, now: [Exit()] if event == Work(1) else [])
    drive(machine, meanwhile=post_two)
    assert machine.events == [Started(), Work(1)]


def test_what_comes_before_the_run_waits_until_the_machine_has_started() -> None:
    async def scenario() -> list[object]:
        machine = Scripted(lambda event, now: [Exit()] if event == Work(1) else [])
        shell = Shell(machine, clock=Clock())
        shell.post(Work(1))
        await asyncio.sleep(0)  # a turn of the loop
        await asyncio.sleep(0)
        assert not machine.events
        with closing(Transport(PeerId("me#1"), shell.post)) as transport:
            await shell.run(transport)
        return machine.events

    assert run(scenario()) == [Started(), Work(1)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_the_machine_to_stop(number: signal.Signals) -> None:
    def answer(event: object, now: float) -> list[object]:
        if isinstance(event, Started):
            os.kill(os.getpid(), number)
        return [Exit("asked")] if isinstance(event, StopRequested) else []

    assert drive(Scripted(answer)) == "asked"


def test_a_second_signal_at_once_is_the_same_request() -> None:
    def answer(event: object, now: float) -> list[object]:
        match event:
            case Started():
                os.kill(os.getpid(), signal.SIGTERM)
            case StopRequested():
                os.kill(os.getpid(), signal.SIGTERM)
                return [SetTimer("end", now + 0.1)]
            case TimerFired():
                return [Exit("asked")]
        return []

    machine = Scripted(answer)
    assert drive(machine, clock=StandingClock()) == "asked"
    assert machine.events.count(StopRequested()) == 1


def test_signals_before_it_runs_wait_for_it() -> None:
    """As while a node opens its store: what it has begun is cleaned up by the machine's own end."""

    def told(shell: Shell) -> None:
        shell.listen_for_stop()
        os.kill(os.getpid(), signal.SIGTERM)

    machine = Scripted(lambda event, now: [Exit("asked")] if isinstance(event, StopRequested) else [])
    assert drive(machine, meanwhile=told) == "asked"
    assert machine.events == [Started(), StopRequested()]


def test_log_actions_become_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    drive(Scripted(lambda event, now: [Log("warning", "decode node lost", {"peer": "d0"}), Exit()]))
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "decode node lost" in record.getMessage()


def test_messages_go_through_the_transport() -> None:
    """Two machines on two shells: connect, send, answer, disconnect."""
    abort = Abort(request_id=RequestId("r"), epoch=1)

    def answer_server(event: object, now: float) -> list[object]:
        return [Send(event.peer, abort), Exit("answered")] if isinstance(event, Received) else []

    def answer_client(event: object, now: float) -> list[object]:
        match event:
            case Started():
                return [Connect(PeerId("d0#1"), address[0]), Send(PeerId("d0#1"), abort)]
            case Received(peer="d0#1"):
                return [Disconnect(PeerId("d0#1")), Send(PeerId("d0#1"), abort)]
            case PeerLost(peer="d0#1", reason=reason):
                return [Exit(reason)]
        raise AssertionError(event)

    address: list[str] = []

    async def main() -> list[str]:
        shells = [Shell(Scripted(answer), clock=Clock()) for answer in (answer_server, answer_client)]
        server, client = Transport(PeerId("d0#1"), shells[0].post), Transport(PeerId("p0#1"), shells[1].post)
        try:
            address.extend(server.bind("tcp://127.0.0.1:0"))
            return list(await asyncio.gather(shells[0].run(server), shells[1].run(client)))
        finally:
            server.close()
            client.close()

    assert run(main()) == ["answered", "not connected"]
