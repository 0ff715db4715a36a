"""Silence of peers, and the time in which this process itself did not run."""

from __future__ import annotations

import pytest

from kvrelay.machine.liveness import MAX_PAUSES, PAUSE_S, READ_FIRST_S, TICK_S, Liveness, Pauses
from kvrelay.protocol.ids import PeerId

PEER = PeerId("p0#1")


def test_a_pause_counts_as_no_silence() -> None:
    alive = Liveness(peer_timeout_s=5.0)
    alive.watch(PEER, 100.0)
    alive.resumed(7.0, 109.0)
    assert alive.lost(111.9) == []
    assert alive.lost(112.0) == [PEER]


def test_a_peer_heard_since_the_pause_is_not_heard_in_the_future() -> None:
    alive = Liveness(peer_timeout_s=5.0)
    alive.watch(PEER, 108.0)
    alive.resumed(7.0, 109.0)
    assert alive.lost(113.9) == []
    assert alive.lost(114.0) == [PEER]


def test_a_dead_peer_is_found_by_a_loop_that_is_always_slow() -> None:
    alive = Liveness(peer_timeout_s=5.0)
    alive.watch(PEER, 0.0)
    alive.record_message(PEER, 0.0)
    lost_s = []
    for now in range(1, 100):
        alive.resumed(PAUSE_S, float(now))
        if alive.lost(float(now)):
            lost_s.append(now)
    assert lost_s == [MAX_PAUSES + 5]


def test_a_peer_that_is_heard_between_pauses_is_excused_each_time() -> None:
    alive = Liveness(peer_timeout_s=5.0)
    alive.watch(PEER, 0.0)
    for now in range(10, 1000, 10):
        alive.resumed(9.0, float(now))
        assert alive.lost(float(now)) == []
        alive.record_message(PEER, float(now))


def test_a_process_that_runs_has_no_pauses() -> None:
    pauses = Pauses(100.0)
    now = 100.0
    for _ in range(20):
        now += TICK_S
        assert pauses.reading_s(now) == 0.0
        assert pauses.take(now) == 0.0


@pytest.mark.parametrize("seen_by", ["tick", "event", "timer"])
def test_a_pause_is_told_once_whoever_sees_it_first(seen_by: str) -> None:
    pauses = Pauses(100.0)
    if seen_by == "tick":
        pauses.ran(107.0)
    if seen_by == "timer":
        assert pauses.reading_s(107.0) == pytest.approx(READ_FIRST_S)
    assert pauses.take(107.0) == pytest.approx(7.0)
    assert pauses.take(107.0) == 0.0
    assert pauses.reading_s(107.0) == pytest.approx(READ_FIRST_S)
    assert pauses.reading_s(107.0 + READ_FIRST_S) == 0.0


def test_pauses_that_were_not_told_add_up() -> None:
    pauses = Pauses(100.0)
    pauses.ran(103.0)
    pauses.ran(103.5)
    pauses.ran(103.5 + PAUSE_S)
    assert pauses.take(105.0) == pytest.approx(3.0 + PAUSE_S)
