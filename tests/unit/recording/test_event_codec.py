"""Every event of every role as bytes and back; every action as bytes that differ if it does."""

from __future__ import annotations

from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import EXAMPLES, random_values

from cache_messager.machine import MessagerEvent
from cache_messager.recording import MESSAGER_EVENTS
from cache_messager.work import Work
from kvrelay.errors import RemoteProtocolError
from kvrelay.machine.contract import CoreAction, CoreEvent, Log, Received, Send, SetTimer, TimerFired
from kvrelay.node.recording import NODE_EVENTS
from kvrelay.protocol.codec import encode
from kvrelay.protocol.ids import Attempt, PeerId, RequestId
from kvrelay.protocol.messages.router_to_node import Abort
from kvrelay.recording.event_codec import EventCodec, kinds_of, names_of
from router.events import RouterAction
from router.machine import RouterEvent
from router.recording import ROUTER_EVENTS
from router.request import RequestTimer

EVENTS = [
    (codec, kind)
    for codec, union in ((NODE_EVENTS, CoreEvent), (ROUTER_EVENTS, RouterEvent), (MESSAGER_EVENTS, MessagerEvent))
    for kind in get_args(union)
]
ACTIONS = sorted({*get_args(CoreAction), *get_args(RouterAction), *get_args(Work)}, key=lambda kind: kind.__name__)


def unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


@pytest.mark.parametrize(("codec", "kind"), EVENTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_event_comes_back(codec: EventCodec, kind: type) -> None:
    @settings(max_examples=15)
    @given(random_values(kind), st.floats(allow_nan=False))
    def comes_back(event: object, now: float) -> None:
        if isinstance(event, Received):
            event = msgspec.structs.replace(event, encoded=b"")  # for these see the next test
        encoded = codec.encode(event, now)
        at_s, decoded = codec.decode(unpacked(encoded))
        assert (at_s, type(decoded)) == (now, kind)
        assert codec.encode(decoded, now) == encoded
        if getattr(event, "error", None) is None:  # exceptions are equal to themselves only
            assert decoded == event

    comes_back()


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back(message: Any) -> None:
    event = Received(PeerId("p0#1"), message)
    for encoded in (b"", encode(message)):
        record = NODE_EVENTS.encode(msgspec.structs.replace(event, encoded=encoded), 1.0)
        assert NODE_EVENTS.decode(unpacked(record)).event == event


@pytest.mark.parametrize(
    ("codec", "key"),
    [(NODE_EVENTS, Attempt(RequestId("r"), 2)), (ROUTER_EVENTS, RequestTimer(RequestId("r"), "deadline"))],
    ids=["node", "router"],
)
def test_timers_keep_the_type_of_their_keys(codec: EventCodec, key: tuple[Any, ...]) -> None:
    decoded = codec.decode(unpacked(codec.encode(TimerFired(key), 1.0))).event
    assert isinstance(decoded, TimerFired)
    assert decoded.key == key
    assert type(decoded.key) is type(key)


def test_errors_keep_their_type_and_text() -> None:
    error = {"link_id": 1, "frame": msgspec.to_builtins(frame()), "error": ["CorruptKVError", "layer 3"]}
    decoded: Any = MESSAGER_EVENTS.decode([1.0, "BlocksWritten", error]).event
    assert (type(decoded.error).__name__, decoded.error.message) == ("CorruptKVError", "layer 3")


def test_kv_is_not_in_the_bytes_and_its_sizes_are() -> None:
    event = Received(PeerId("p0.messager#1"), frame(), (memoryview(b"precious" * 8), memoryview(b"kv")))
    encoded = MESSAGER_EVENTS.encode(event, 1.0)
    assert b"precious" not in encoded
    decoded = MESSAGER_EVENTS.decode(unpacked(encoded)).event
    assert isinstance(decoded, Received)
    assert [part.nbytes for part in decoded.payload] == [64, 2]


@pytest.mark.parametrize("kind", ACTIONS, ids=lambda kind: kind.__name__)
def test_actions_that_differ_have_different_bytes(kind: type) -> None:
    @settings(max_examples=15)
    @given(random_values(kind), random_values(kind))
    def differ(one: object, other: object) -> None:
        first, second = (NODE_EVENTS.encode_actions([action]) for action in (one, other))
        assert (first == second) == (one == other)

    differ()


def test_names_of_actions_say_what_is_sent() -> None:
    abort = Send(PeerId("p0#1"), Abort(request_id=RequestId("r"), epoch=1))
    assert names_of(kinds_of([abort, SetTimer("heartbeat", 1.0)])) == "Send:Abort SetTimer"


def test_a_log_line_may_have_anything_in_it() -> None:
    assert unpacked(NODE_EVENTS.encode_actions([Log("info", "x", {"what": {1}})]))[0][1]["fields"] == {"what": [1]}
    assert b"Ellipsis" in NODE_EVENTS.encode_actions([Log("info", "x", {"what": ...})])


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        [1.0, "Started"],
        [1.0, "NoSuchEvent", {}],
        [1.0, "Submitted", {"requests": []}],  # the router's
        [1.0, "Received", ["p0", "NoSuchMessage", {}, []]],
        [1.0, "Received", ["p0", b"\x00", []]],
        [1.0, "Received", ["p0"]],
        [1.0, "Received", ["p0", "Abort", {"request_id": 7, "epoch": 1}, []]],
        [1.0, "Received", ["p0", "Abort", {"request_id": "r", "epoch": 1}, [-1]]],
        [1.0, "Received", ["p0", "Abort", {"request_id": "r", "epoch": 1}, [1 << 62]]],
        [1.0, "PeerLost", {"peer": "p0"}],
        [1.0, "LayersComputed", {"step": 1, "layers": ["a"]}],
        ["now", "Started", {}],
    ],
    ids=repr,
)
def test_what_is_no_event_of_the_role_is_refused(record: object) -> None:
    with pytest.raises(RemoteProtocolError):
        NODE_EVENTS.decode(record)


def frame() -> Any:
    return next(message for message in EXAMPLES if type(message).__name__ == "KVFrame")
