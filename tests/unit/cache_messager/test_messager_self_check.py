"""Messagers that check themselves while no transfer is under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from messager_pair import D, P, Pair, one_of_each

from kvrelay.protocol.ids import Attempt, RequestId

A = Attempt(RequestId("a"), 1)

pytestmark = pytest.mark.usefixtures("pair_pools")


def transfer(pair: Pair) -> None:
    sources, targets = one_of_each(pair, A)
    pair.signal_all(A, sources)
    pair.open(A, targets)
    pair.run()


def keep_credit(machine: Any) -> None:
    next(iter(machine._sender._links.values())).inflight_bytes += 1


def lose_a_frame_slot(machine: Any) -> None:
    next(iter(machine._sender._links.values()))._free_slots.pop()


def keep_a_signal(machine: Any) -> None:
    machine._sender._transfers._pending.num_signals += 1


def test_both_ends_check_themselves_after_a_transfer() -> None:
    with Pair() as pair:
        transfer(pair)
        pair.advance(20.0)
        for end in (P, D):
            assert pair.counter(end, "messager_self_checks") == 1
            assert pair.counter(end, "messager_self_check_violations") == 0


@pytest.mark.parametrize("leak", [keep_credit, lose_a_frame_slot, keep_a_signal])
def test_what_a_transfer_leaves_behind_is_found(leak: Callable[[Any], None]) -> None:
    with Pair() as pair:
        transfer(pair)
        leak(pair.ends[P].machine)
        pair.advance(20.0)
        assert pair.counter(P, "messager_self_check_violations") == 1
        assert pair.counter(D, "messager_self_check_violations") == 0


def test_a_messager_with_a_transfer_is_not_checked() -> None:
    with Pair() as pair:
        sources, _ = one_of_each(pair, A)
        pair.signal_all(A, sources)
        pair.advance(3.0)
        assert pair.counter(P, "messager_self_checks") == 0
        assert pair.counter(D, "messager_self_checks") == 0


def test_a_link_that_is_lost_during_a_check_does_no_harm() -> None:
    with Pair() as pair:
        transfer(pair)
        messager = pair.ends[P].machine
        checked = 0.0
        while not checked:
            pair.advance(1.0)
            checked = pair.counter(P, "messager_self_checks")
            pair.lose(P, next(iter(messager._sender._links), D))
        assert pair.counter(P, "messager_self_check_violations") == 0
