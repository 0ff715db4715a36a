"""The recording in memory: what it keeps, within which bound, and that nothing breaks it."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
from support.machines import NodeHarness, spec

from kvrelay.config.cluster_config import Role
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import Exit, PeerLost, Ready, Received, Send, Started, StopRequested
from kvrelay.node.recording import NODE_EVENTS
from kvrelay.protocol.codec import encode
from kvrelay.protocol.ids import ROUTER, PeerId, RequestId
from kvrelay.protocol.messages.router_to_node import Abort, Generate
from kvrelay.recording.recorder import Recorder, Recording
from kvrelay.recording.settings import RecordingSettings


def recorder(max_bytes: int = 1 << 20, *, actions: bool = False) -> Recorder:
    return Recorder("m0", "mixed", {}, NODE_EVENTS, RecordingSettings(max_bytes=max_bytes, actions=actions))


def record(it: Recorder, event: object, actions: Sequence[object] = (), now: float = 1.0) -> None:
    it.recorded(lambda event, now: actions)(event, now)


def objects_in(recording: Recording) -> list[Any]:
    unpacker = msgpack.Unpacker(strict_map_key=False)
    for segment in recording.segments:
        unpacker.feed(segment)
    return list(unpacker)


def events_in(recording: Recording) -> list[object]:
    return [NODE_EVENTS.decode(event).event for event in objects_in(recording)[::2]]


def actions_in(recording: Recording) -> list[Any]:
    return objects_in(recording)[1::2]


def size_of(recording: Recording) -> int:
    return sum(map(len, recording.segments))


def test_events_and_the_types_of_their_actions_are_kept_in_order() -> None:
    it = recorder()
    abort = Send(PeerId("p0#1"), Abort(request_id=RequestId("r"), epoch=1))
    for event in (Started(), StopRequested()):
        record(it, event, [Ready(), abort, Exit("done")])
    recording = it.recording()
    assert events_in(recording) == [Started(), StopRequested()]
    names = [[recording.kinds[number] for number in numbers] for numbers in actions_in(recording)]
    assert names == [["Ready", "Send:Abort", "Exit"]] * 2
    assert recording.first == 0


def test_actions_are_kept_in_full_if_wanted() -> None:
    it = recorder(actions=True)
    record(it, Started(), [Exit("done")])
    assert actions_in(it.recording()) == [[["Exit", {"reason": "done"}]]]


def test_the_oldest_are_forgotten_beyond_the_bound_and_counted() -> None:
    it = recorder(max_bytes=10_000)
    for number in range(1000):
        record(it, PeerLost(PeerId("p0#1"), f"{number}"))
        assert size_of(it.recording()) <= 10_000
    recording = it.recording()
    kept = len(events_in(recording))
    assert size_of(recording) > 8_000
    assert recording.first == 1000 - kept
    assert events_in(recording) == [PeerLost(PeerId("p0#1"), f"{number}") for number in range(1000 - kept, 1000)]


@pytest.mark.parametrize("max_bytes", [1, 300, 3000, 1 << 16, 1 << 20])
def test_no_mixture_of_events_takes_more_than_the_bound(max_bytes: int) -> None:
    rng, it = random.Random(max_bytes), recorder(max_bytes)
    for number in range(200):
        text = "x" * int(10 ** rng.uniform(0, 5))
        message = Abort(request_id=RequestId(text), epoch=1)
        record(it, rng.choice([Received(ROUTER, message, (), encode(message)), PeerLost(PeerId(text), "")]), [Ready()])
        recording = it.recording()
        assert size_of(recording) <= max_bytes
        assert recording.first + len(events_in(recording)) == number + 1
        assert len(actions_in(recording)) == len(events_in(recording))


def test_the_memory_it_takes_is_about_the_bound() -> None:
    it = recorder(max_bytes=1 << 20)
    handle = it.recorded(lambda event, now: [])
    tracemalloc.start()
    try:
        for number in range(60_000):
            handle(PeerLost(PeerId("p0#1"), f"{number}"), 1.0)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert it.recording().first > 0
    assert taken < 1.1 * (1 << 20)


def test_an_event_beyond_the_bound_is_not_kept_and_the_next_is() -> None:
    it = recorder(max_bytes=2_000)
    record(it, Received(ROUTER, Generate(request=spec(prompt=10_000))))
    assert events_in(it.recording()) == []
    record(it, Started())
    assert (events_in(it.recording()), it.recording().first) == ([Started()], 1)


def test_an_event_that_is_not_over_is_the_last_record() -> None:
    it = recorder()

    def fail(event: object, now: float) -> list[object]:
        raise LocalProtocolError("broken")

    record(it, Started())
    with pytest.raises(LocalProtocolError, match="broken"):
        it.recorded(fail)(StopRequested(), 2.0)
    assert objects_in(it.recording()) == [[1.0, "Started", {}], [], [2.0, "StopRequested", {}]]


def test_what_a_machine_does_later_changes_nothing_of_what_is_recorded() -> None:
    it, node = recorder(actions=True), NodeHarness(Role.MIXED)
    event = Received(ROUTER, Generate(request=spec(max_tokens=30)))
    it.recorded(lambda event, now: node.post(event))(event, node.now)
    before = it.recording()
    node.run_steps()
    assert it.recording() == before
    assert events_in(before) == [Received(ROUTER, Generate(request=spec(max_tokens=30)))]


def test_what_a_machine_does_with_an_event_changes_nothing_of_what_is_recorded() -> None:
    it = recorder()

    def change(event: Any, now: float) -> list[object]:
        event.message.request.prompt_token_ids.clear()
        return []

    it.recorded(change)(Received(ROUTER, Generate(request=spec(prompt=[1, 2, 3]))), 1.0)
    assert events_in(it.recording()) == [Received(ROUTER, Generate(request=spec(prompt=[1, 2, 3])))]


def test_a_message_is_kept_as_it_came_and_not_referred_to() -> None:
    it, message = recorder(), Abort(request_id=RequestId("r"), epoch=1)
    event = Received(ROUTER, message, (memoryview(bytes(8)),), encode(message))
    held = sys.getrefcount(event), sys.getrefcount(message), sys.getrefcount(event.payload[0])
    record(it, event)
    assert (sys.getrefcount(event), sys.getrefcount(message), sys.getrefcount(event.payload[0])) == held
    assert objects_in(it.recording())[0] == [1.0, "Received", ["router", encode(message), [8]]]
    assert events_in(it.recording()) == [Received(ROUTER, message, (memoryview(bytes(8)),))]


def test_a_text_that_is_none_stops_nobody() -> None:
    it = recorder()
    record(it, Started())
    record(it, Received(ROUTER, Abort(request_id=RequestId("\ud800"), epoch=1)))
    record(it, Started())
    first, [now, kind, text], last = objects_in(it.recording())[::2]
    assert (first, now, kind, last) == ([1.0, "Started", {}], 1.0, "Received", [1.0, "Started", {}])
    assert "\\ud800" in text


def test_a_text_in_actions_that_is_none_stops_nobody() -> None:
    it = recorder(actions=True)
    record(it, Started(), [Exit("\ud800")])
    recording = it.recording()
    assert [[recording.kinds[number] for number in numbers] for numbers in actions_in(recording)] == [["Exit"]]
