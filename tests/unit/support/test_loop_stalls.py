"""The probe of all router tests: it must see what holds the loop, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

import pytest
from support import loop_stalls
from support.loop_stalls import MAX_INLINE_LENGTH, MAX_INLINE_TOTAL, LoopStalls, watching_for_stalls

from router.text.plain_tokenizer import plain_tokenizer


def compute(seconds: float) -> None:
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


class RoutersOwn:
    """Stands for an object of the router: its callbacks are not those of a test."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def work(self) -> None:
        self._act()


RoutersOwn.__module__ = "router.own"
RoutersOwn.work.__module__ = "router.own"


def stalls_of(act: Callable[[], object]) -> list[str]:
    """Return what is found while the router does ``act`` on the loop."""

    async def main() -> None:
        done = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(RoutersOwn(act).work)
        asyncio.get_running_loop().call_soon(done.set_result, None)
        await done

    with watching_for_stalls() as stalls:
        asyncio.run(main())
    return stalls.found


@pytest.fixture
def usual_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this machine for one of usual speed: how long it computes is told to it as a time."""
    monkeypatch.setattr(loop_stalls, "slowness", lambda: 1.0)


@pytest.mark.usefixtures("usual_speed")
def test_computing_on_the_loop_is_found() -> None:
    (found,) = stalls_of(lambda: compute(0.08))
    assert "router.own" in found


def test_a_slow_machine_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    usual_s = loop_stalls._USUAL_S
    monkeypatch.setattr(loop_stalls, "_sample_s", lambda: 4 * usual_s)
    assert loop_stalls.slowness() == 4.0
    assert stalls_of(lambda: compute(0.08)) == []
    monkeypatch.setattr(loop_stalls, "_sample_s", lambda: usual_s / 4)
    assert loop_stalls.slowness() == 1.0
    assert len(stalls_of(lambda: compute(0.08))) == 1


def test_waiting_is_no_work() -> None:
    assert stalls_of(lambda: time.sleep(0.1)) == []


def test_computing_of_tests_does_not_count() -> None:
    async def main() -> None:
        compute(0.1)

    with watching_for_stalls() as stalls:
        asyncio.run(main())
    assert stalls.found == []


@pytest.mark.usefixtures("usual_speed")
def test_collecting_garbage_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect() -> None:
        stalls.collecting("start", {})
        compute(0.1)
        stalls.collecting("stop", {})

    stalls = LoopStalls()
    run = stalls.measured(lambda handle: handle._callback())  # type: ignore[attr-defined]
    loop = asyncio.new_event_loop()
    run(asyncio.Handle(RoutersOwn(collect).work, (), loop))
    run(asyncio.Handle(RoutersOwn(lambda: compute(0.06)).work, (), loop))
    loop.close()
    assert len(stalls.found) == 1
    assert gc.isenabled()


@pytest.mark.parametrize(("length", "times"), [(MAX_INLINE_LENGTH + 1, 1), (10, MAX_INLINE_TOTAL // 11 + 1)])
def test_tokenizing_in_a_thread_is_found(length: int, times: int) -> None:
    def tokenize() -> None:
        for _ in range(times):
            encode("a" * length)

    with watching_for_stalls() as stalls:
        encode = plain_tokenizer(1024).encode
        asyncio.run(asyncio.to_thread(tokenize))
    (found,) = stalls.found
    assert f"encode of {length} items" in found
