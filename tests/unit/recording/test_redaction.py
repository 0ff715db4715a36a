"""What is left out of a file without prompts: each field that could hold tokens or text is decided on."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import msgspec
import pytest
from support.messages import EXAMPLES

from cache_messager.machine import MessagerEvent
from kvrelay.machine.contract import CoreEvent, Received
from kvrelay.protocol.codec import MESSAGES
from kvrelay.protocol.ids import PeerId
from kvrelay.recording.redaction import SECRET, without_prompts
from router.machine import RouterEvent

HARMLESS: frozenset[str] = frozenset(
    """
    CancelReservation.reason DecodeNeeded.reason DeviceLost.reason DropBlocks.namespace Dump.dump_id
    DumpMessager.dump_id DumpRequested.dump_id DumpWritten.dump_id DumpWritten.error DumpWritten.path
    DumpWritten.process Dumped.dump_id Dumped.error Dumped.path Dumped.process EngineLost.reason ErrorInfo.code
    ErrorInfo.message FetchBlocks.namespace HistogramReport.counts HistogramReport.label HistogramReport.name
    KVGeometry.dtype KVGeometry.layout KVGeometry.model_digest LinkAccepted.handle LinkAccepted.kind
    LinkAccepted.passed_over LinkAddress.host_id LinkAddress.ipc LinkAddress.tcp LinkLost.reason
    LinkOffer.handle LinkOffer.kind LinkReady.handle LinkReady.kind LinkReady.reason LinkRefused.code
    LinkRefused.reason Load.counters Load.gauges Load.link_bytes_per_s Load.prompt_tokens Mark.name Mark.node
    MessagerDumped.dump_id
    MessagerDumped.error MessagerDumped.path MessagerDumped.process MessagerStats.counters MessagerStats.gauges
    MessagerStats.link_bytes_per_s
    NewRequest.answer_id NodeAddress.address NodeEntry.state PeerLost.reason PromptWait.counts
    ProtocolViolation.reason Register.address Register.incarnation Register.model Register.prefill_order
    Register.role Registered.router_incarnation RegistrationRefused.reason RegistryLost.reason
    ReservationEnded.reason ReservationRefused.reason SamplingParams.eos_token_ids SequenceChange.replaced
    SequenceFailed.reason StepFailed.reason StoreCounted.counters TransferDone.link
    """.split()  # noqa: SIM905 (one to a line would be a page)
)
"""Fields with text, bytes or lists of numbers that say nothing about what clients wrote and got.

Names, addresses, ids and reasons are in the log too. A new field belongs here, or into SECRET.
"""


def may_hold_secrets(kind: Any) -> bool:
    """Return whether a field of this type has text, bytes or several numbers that are no ids."""
    if kind in (str, bytes):
        return True
    arguments = [argument for argument in get_args(kind) if argument is not ...]
    if get_origin(kind) in (list, tuple, dict) and int in arguments:
        return True
    return get_origin(kind) is not typing.Literal and any(map(may_hold_secrets, arguments))


def fields(kind: Any, seen: set[Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield type, name and type of each field of ``kind``, and of what is in it, but for what is in secret fields."""
    for argument in get_args(kind):
        yield from fields(argument, seen)
    is_record = isinstance(kind, type) and (issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind))
    if not is_record or kind in seen:
        return
    seen.add(kind)
    for name, hint in typing.get_type_hints(kind).items():
        yield kind.__name__, name, hint
        if name not in SECRET:
            yield from fields(hint, seen)


def all_fields() -> set[tuple[str, str, Any]]:
    seen: set[Any] = set()
    found = [entry for union in (CoreEvent, RouterEvent, MessagerEvent) for entry in fields(union, seen)]
    found += [entry for kind in MESSAGES.values() for entry in fields(kind, seen)]
    return {(kind, name, may_hold_secrets(hint)) for kind, name, hint in found}


def test_every_field_that_may_hold_what_clients_wrote_is_secret_or_known_to_be_harmless() -> None:
    suspects = {f"{kind}.{name}" for kind, name, suspect in all_fields() if suspect and name not in SECRET}
    assert suspects == HARMLESS


def test_every_secret_field_exists() -> None:
    assert {name for _, name, _ in all_fields()} >= SECRET


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_stand_ins_are_as_many_and_of_the_same_types(message: Any) -> None:
    event = Received(PeerId("p0#1"), message)
    public = without_prompts(event)
    assert shape(public) == shape(event)
    assert without_prompts(public) == public
    # Of the values of secret fields nothing is left.
    assert [value for value in secrets_in(public, secret=False) if value] == []


def shape(value: Any) -> Any:
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))
    return (
        [*map(shape, plain)]
        if isinstance(plain, list | tuple)
        else len(plain)
        if isinstance(plain, bytes)
        else type(plain)
    )


def secrets_in(value: Any, *, secret: bool) -> Iterator[Any]:
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from secrets_in(getattr(value, name), secret=secret or name in SECRET)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from secrets_in(getattr(value, field.name), secret=secret or field.name in SECRET)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from secrets_in(item, secret=secret)
    elif isinstance(value, dict):
        for item in value.values():
            yield from secrets_in(item, secret=secret)
    elif secret:
        yield value if not isinstance(value, bytes) else value.strip(b"\x00")
