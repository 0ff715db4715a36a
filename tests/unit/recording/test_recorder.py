"""The recording in memory: what it keeps, within which bound, and that nothing breaks it."""

from __future__ import annotations

import msgpack
from support.machines import NodeHarness, spec

from kvrelay.config.cluster_config import Role
from kvrelay.machine.contract import Exit, PeerLost, Ready, Received, Started, StopRequested
from kvrelay.node.recording import NODE_EVENTS
from kvrelay.protocol.ids import ROUTER, PeerId, RequestId
from kvrelay.protocol.messages.router_to_node import Abort, Generate
from kvrelay.recording.recorder import Recorder, Recording
from kvrelay.recording.settings import RecordingSettings


def recorder(max_bytes: int = 1 << 20, *, actions: bool = False) -> Recorder:
    return Recorder("m0", "mixed", {}, NODE_EVENTS, RecordingSettings(max_bytes=max_bytes, actions=actions))


def events_in(recording: Recording) -> list[object]:
    return [NODE_EVENTS.decode(msgpack.unpackb(event, strict_map_key=False)).event for event, _ in recording.records]


def test_events_and_the_types_of_their_actions_are_kept_in_order() -> None:
    it = recorder()
    for event in (Started(), StopRequested()):
        it.begin(event, 1.0)
        it.end([Ready(), Exit("done")])
    recording = it.recording()
    assert events_in(recording) == [Started(), StopRequested()]
    assert [actions for _, actions in recording.records] == [(Ready, Exit)] * 2
    assert recording.first == 0


def test_actions_are_kept_in_full_if_wanted() -> None:
    it = recorder(actions=True)
    it.begin(Started(), 1.0)
    it.end([Exit("done")])
    assert it.recording().records[0][1] == NODE_EVENTS.encode_actions([Exit("done")])


def test_the_oldest_are_forgotten_beyond_the_bound_and_counted() -> None:
    it = recorder(max_bytes=10_000)
    for number in range(1000):
        it.begin(PeerLost(PeerId("p0#1"), f"{number}"), 1.0)
        it.end([])
    recording = it.recording()
    kept = len(recording.records)
    assert 0 < sum(len(event) for event, _ in recording.records) <= 10_000
    assert recording.first == 1000 - kept
    assert events_in(recording) == [PeerLost(PeerId("p0#1"), f"{number}") for number in range(1000 - kept, 1000)]


def test_an_event_beyond_the_bound_is_not_kept_and_the_next_is() -> None:
    it = recorder(max_bytes=2_000)
    it.begin(Received(ROUTER, Generate(request=spec(prompt=10_000))), 1.0)
    it.end([])
    assert it.recording().records == []
    it.begin(Started(), 2.0)
    it.end([])
    assert (events_in(it.recording()), it.recording().first) == ([Started()], 1)


def test_an_event_that_is_not_over_is_the_last_record() -> None:
    it = recorder()
    it.begin(Started(), 1.0)
    assert [actions for _, actions in it.recording().records] == [None]


def test_what_a_machine_does_later_changes_nothing_of_what_is_recorded() -> None:
    it, node = recorder(actions=True), NodeHarness(Role.MIXED)
    event = Received(ROUTER, Generate(request=spec(max_tokens=30)))
    it.begin(event, node.now)
    it.end(node.post(event))
    before = it.recording().records
    node.run_steps()
    assert it.recording().records == before


def test_a_text_that_is_none_stops_nobody() -> None:
    it = recorder()
    it.begin(Received(ROUTER, Abort(request_id=RequestId("\ud800"), epoch=1)), 1.0)
    it.end([])
    now, kind, text = msgpack.unpackb(it.recording().records[0][0])
    assert (now, kind) == (1.0, "Received")
    assert "\\ud800" in text


def test_a_text_in_actions_that_is_none_stops_nobody() -> None:
    it = recorder(actions=True)
    it.begin(Started(), 1.0)
    it.end([Exit("\ud800")])
    assert it.recording().records[0][1] == (Exit,)
