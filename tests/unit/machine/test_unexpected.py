"""Messages nobody takes are all counted and seldom logged."""

from __future__ import annotations

from kvrelay.machine.contract import Log
from kvrelay.machine.log_limit import INTERVAL_S, MAX_KEYS
from kvrelay.machine.outbox import Outbox
from kvrelay.machine.unexpected import UnexpectedMessages
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.node_to_router import Drained, Leaving


def make(now: float = 1000.0) -> tuple[UnexpectedMessages, Outbox]:
    outbox = Outbox()
    outbox.now = now
    return UnexpectedMessages(outbox), outbox


def logged(outbox: Outbox) -> list[tuple[object, object, object]]:
    lines = [action for action in outbox.take() if isinstance(action, Log)]
    assert all((line.level, line.event) == ("warning", "unexpected message") for line in lines)
    return [(line.fields["peer"], line.fields["message"], line.fields["unexpected_messages"]) for line in lines]


def test_each_sender_and_kind_is_logged_once_and_every_message_counted() -> None:
    unexpected, outbox = make()
    for peer, message in [("a", Leaving()), ("a", Leaving()), ("b", Leaving()), ("a", Drained()), ("b", Leaving())]:
        unexpected.take(PeerId(peer), message)
    assert logged(outbox) == [("a", "Leaving", 1), ("b", "Leaving", 3), ("a", "Drained", 4)]
    assert unexpected.count == 5


def test_they_are_logged_again_after_the_interval() -> None:
    unexpected, outbox = make()
    unexpected.take(PeerId("a"), Leaving())
    outbox.now += INTERVAL_S - 1
    unexpected.take(PeerId("a"), Leaving())
    assert logged(outbox) == [("a", "Leaving", 1)]
    outbox.now += 1
    unexpected.take(PeerId("a"), Leaving())
    unexpected.take(PeerId("a"), Leaving())
    assert logged(outbox) == [("a", "Leaving", 3)]


def test_a_sender_with_many_names_fills_neither_log_nor_memory() -> None:
    unexpected, outbox = make()
    for number in range(10 * MAX_KEYS):
        unexpected.take(PeerId(f"x#{number}"), Leaving())
    assert len(logged(outbox)) == MAX_KEYS
    assert unexpected.count == 10 * MAX_KEYS
    outbox.now += INTERVAL_S
    unexpected.take(PeerId("x#last"), Leaving())
    assert len(logged(outbox)) == 1
