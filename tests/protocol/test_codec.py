"""Every message to bytes and back; and whatever else comes in is a RemoteProtocolError and nothing else."""

from __future__ import annotations

import copy
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.messages import EXAMPLES, random_values

from kvrelay.errors import RemoteProtocolError
from kvrelay.protocol.codec import MAX_MESSAGE_BYTES, MESSAGES, decode, encode
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.base import Heartbeat, Message, ProtocolViolation
from kvrelay.protocol.messages.node_to_router import TokensOut
from kvrelay.protocol.messages.router_to_node import Abort, Prefill

GOLDEN = Path(__file__).with_name("golden_messages.txt")
ALL_TYPES = sorted(MESSAGES.values(), key=lambda kind: kind.__name__)


def name_of(message: object) -> str:
    return type(message).__name__ if isinstance(message, Message) else getattr(message, "__name__", "")


# ---------------------------------------------------------------- what is ours


def test_there_is_an_example_of_every_message() -> None:
    assert sorted(map(name_of, EXAMPLES)) == sorted(MESSAGES)


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_examples_leave_no_field_at_its_default(message: Message) -> None:
    defaults = {
        field.name: field.default for field in msgspec.structs.fields(message) if field.default is not msgspec.NODEFAULT
    }
    assert all(getattr(message, name) != default for name, default in defaults.items())


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_round_trip(message: Message) -> None:
    assert decode(encode(message)) == message
    assert decode(memoryview(encode(message))) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_golden_bytes(message: Message, request: pytest.FixtureRequest) -> None:
    """What goes over the wire stays as it is: other versions of this program read it."""
    if request.config.getoption("regenerate_golden"):
        lines = sorted(f"{name_of(example)} {encode(example).hex()}\n" for example in EXAMPLES)
        GOLDEN.write_text("".join(lines))
    golden = dict(line.split() for line in GOLDEN.read_text().splitlines())
    assert encode(message).hex() == golden[name_of(message)]
    assert decode(bytes.fromhex(golden[name_of(message)])) == message


def test_golden_file_holds_nothing_else() -> None:
    assert [line.split()[0] for line in GOLDEN.read_text().splitlines()] == sorted(MESSAGES)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=name_of)
def test_random_round_trips(kind: type[Message]) -> None:
    @settings(max_examples=10)
    @given(random_values(kind))
    def check(message: Message) -> None:
        assert decode(encode(message)) == message

    check()


@pytest.mark.parametrize("kind", ALL_TYPES, ids=name_of)
def test_messages_are_frozen_and_say_who_tells_whom_and_what_to_do(kind: type[Message]) -> None:
    assert kind.__struct_config__.frozen
    first, _, rest = (kind.__doc__ or "").partition("\n")
    assert "->" in first
    assert "The reader" in rest


def unbounded_floats(kind: Any, path: str) -> Iterator[str]:
    """Yield the paths of floats in ``kind`` that may be any."""
    if kind is float:
        yield path
    elif typing.get_origin(kind) is typing.Annotated:
        bounds = kind.__metadata__[0]
        assert math.isfinite(bounds.ge) and math.isfinite(bounds.le)
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            yield from unbounded_floats(field.type, f"{kind.__name__}.{field.name}")
    else:
        for argument in typing.get_args(kind):
            yield from unbounded_floats(argument, path)


def test_every_float_is_bounded_or_known_to_be_no_time() -> None:
    """One that becomes a timer must be finite: the event loop ends with an infinite one."""
    found = {path for kind in ALL_TYPES for path in unbounded_floats(kind, kind.__name__)}
    sampling = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    parameters = {f"SamplingParams.{name}" for name in (*sampling, "logit_bias")}
    assert found == parameters | {"TokenLogprobs.logprob", "TokenLogprobs.top_logprobs"}


def test_fields_of_a_later_version_are_passed_over() -> None:
    data = msgpack.packb(["Abort", {"request_id": "r", "epoch": 1, "added_later": {"x": [1]}}])
    assert decode(data) == Abort(request_id=RequestId("r"), epoch=1)


def test_fields_an_earlier_version_did_not_send_have_their_defaults() -> None:
    assert decode(msgpack.packb(["Heartbeat", {}])) == Heartbeat(load=None)


# ---------------------------------------------------------------- what is not


def refusal(data: bytes) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(data)
    return caught.value.message


def packed(*body: Any) -> bytes:
    data: bytes = msgpack.packb(list(body))
    return data


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, -1.0, 2**64 - 1])
@pytest.mark.parametrize(
    ("name", "field"),
    [("DecodeNeeded", "retry_after_s"), ("ReservationRefused", "retry_after_s"), ("BlocksReserved", "lease_s")],
)
def test_durations_that_no_timer_can_have_are_refused(name: str, field: str, value: float) -> None:
    example = next(message for message in EXAMPLES if name_of(message) == name)
    fields = {**msgspec.to_builtins(example), field: value}
    assert f"at `$.{field}`" in refusal(packed(name, fields))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("field", ["prefill_tokens_per_s", "gauges", "link_bytes_per_s"])
def test_loads_that_are_no_numbers_are_refused(field: str, value: float) -> None:
    load = {field: value if field == "prefill_tokens_per_s" else {"d0": value}}
    assert "Heartbeat: Expected `float`" in refusal(packed("Heartbeat", {"load": load}))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (packed("Hello", {}), "unknown message 'Hello'"),
        (packed("Message", {}), "unknown message 'Message'"),
        (packed("abort", {"request_id": "r", "epoch": 1}), "unknown message 'abort'"),
        (packed("x" * 5000, {}), f"unknown message '{'x' * 64}'"),
        (packed("Abort"), "not a [tag, fields] pair"),
        (packed("Abort", {}, {}), "not a [tag, fields] pair"),
        (packed("Abort", ["r", 1]), "not a [tag, fields] pair"),
        (packed(b"Abort", {}), "not a [tag, fields] pair"),
        (msgpack.packb({"Abort": {}}), "not a [tag, fields] pair"),
        (msgpack.packb(7), "not a [tag, fields] pair"),
        (packed("Abort", {"request_id": "r"}), "epoch"),
        (packed("Abort", {"request_id": "r", "epoch": "1"}), "epoch"),
        (packed("Abort", {"request_id": "r", "epoch": 1.5}), "epoch"),
        (packed("Abort", {"request_id": b"r", "epoch": 1}), "request_id"),
        (packed("Abort", {"request_id": None, "epoch": 1}), "request_id"),
        (packed("Abort", {1: 2, "request_id": "r", "epoch": 1}), "Abort"),
        (packed("Prefill", {"request": {"request_id": "r"}, "decode_node": None}), "epoch"),
        (packed("Prefill", {"request": [], "decode_node": None}), "request"),
        (packed("ReserveBlocks", {"request_id": "r", "epoch": 1, "block_hashes": ["text"]}), "block_hashes"),
        (packed("RenewReservations", {"attempts": [["r"]]}), "attempts"),
        (packed("LayerSignal", {"step": 1, "layer": 0, "spans": [["r", 1, 0]]}), "spans"),
        (packed("TokensOut", {"outputs": [{"finish_reason": "bored"}]}), "TokensOut"),
        (b"", "not MessagePack"),
        (b"\xc1", "not MessagePack"),
        (packed("Leaving", {}) + b"\x00", "not MessagePack"),
        (b"\x92\xa5\xff\xff\xff\xff\xff\x80", "not MessagePack"),  # a tag that is not UTF-8
        (b"\xdd\xff\xff\xff\xff", "not MessagePack"),  # an array of 2**32 - 1 items that are not there
        (b"\xdf\xff\xff\xff\xff", "not MessagePack"),
        (b"\xdb\xff\xff\xff\xff", "not MessagePack"),
        (b"\xc9\x00\x00\x00\x01\x05x", "not MessagePack"),  # an extension type
        (b"\xc7\x00\xff", "not MessagePack"),  # a timestamp without a time
        (b"\xd4\x05x", "not MessagePack"),
        (b"\x91" * 100_000, "not MessagePack"),
        (b"\x81\x90\x00", "not MessagePack"),  # a list as a key
        (b"\x92\xa5Abort\x81\x81\x01\x01\x02", "not MessagePack"),  # a map as a key
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(data: bytes, told: str) -> None:
    reason = refusal(data)
    assert told in reason
    assert len(reason) < 500


def test_a_message_that_is_too_long_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.protocol.codec.msgpack.unpackb", None)
    told = f"message of {MAX_MESSAGE_BYTES + 1} bytes, the limit is {MAX_MESSAGE_BYTES}"
    assert refusal(bytes(MAX_MESSAGE_BYTES + 1)) == told


def test_a_prompt_of_a_million_tokens_fits() -> None:
    spec = next(example for example in EXAMPLES if isinstance(example, Prefill)).request
    message = Prefill(request=msgspec.structs.replace(spec, prompt_token_ids=[100_000] * 10**6), decode_node=None)
    assert decode(encode(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_every_truncation_is_refused(message: Message) -> None:
    data = encode(message)
    for length in range(len(data)):
        refusal(data[:length])


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_every_field_refuses_what_is_of_another_type(message: Message) -> None:
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    for name in fields:
        wrong = copy.deepcopy(fields)
        wrong[name] = {"no": ["such", "value"], "at": True}
        if isinstance(fields[name], dict) and name in ("counters", "gauges", "load"):
            wrong[name] = 7
        refusal(packed(type(message).__name__, wrong))


@pytest.mark.fault("F28")
@settings(max_examples=400)
@given(st.binary(max_size=200))
@example(b"\x92\xa8Leaving\x80")
def test_random_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        decode(data)
    except RemoteProtocolError:
        return


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.sampled_from(EXAMPLES), st.data())
def test_real_messages_with_a_field_exchanged_are_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    if fields:
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(_VALUES)
    try:
        decode(packed(type(message).__name__, fields))
    except RemoteProtocolError:
        return


@pytest.mark.fault("F28")
@settings(max_examples=300)
@given(st.sampled_from(EXAMPLES), st.integers(0, 1 << 20), st.integers(0, 255))
def test_real_messages_with_a_byte_flipped_are_a_message_or_refused(message: Message, at: int, flip: int) -> None:
    data = bytearray(encode(message))
    data[at % len(data)] ^= flip
    try:
        decode(bytes(data))
    except RemoteProtocolError:
        return


def test_text_of_outputs_that_is_not_utf_8_is_refused() -> None:
    data = encode(next(message for message in EXAMPLES if isinstance(message, TokensOut)))
    with pytest.raises(RemoteProtocolError):
        decode(data.replace(b"request_id", b"request_\xff\xff", 1))
    with pytest.raises(RemoteProtocolError):
        decode(data.replace(b"cmpl-1", b"cmpl-\xff", 1))


def test_a_violation_can_itself_be_read() -> None:
    assert decode(encode(ProtocolViolation(reason=refusal(b"\xc1")))) == ProtocolViolation(reason=refusal(b"\xc1"))
