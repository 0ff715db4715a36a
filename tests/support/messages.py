"""An example of every message, and random ones of any."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Hashable, Sequence
from enum import Enum
from typing import Any

import msgspec
from hypothesis import strategies as st

from kvrelay.errors import CorruptKVError, TransferError
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import Attempt, BlockId, NodeId, PeerId, RequestId, SequenceId
from kvrelay.protocol.messages.base import (
    ErrorInfo,
    Heartbeat,
    HistogramReport,
    LayerTransfer,
    LinkAddress,
    Load,
    Mark,
    Message,
    NodeAddress,
    PromptWait,
    ProtocolViolation,
)
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.engine import (
    NewSequence,
    SampledTokens,
    ScheduledTokens,
    SequenceChange,
    SequenceFailed,
    StepPlan,
    StepResult,
)
from kvrelay.protocol.messages.messager_to_messager import (
    AckStatus,
    FrameAck,
    KVFrame,
    LinkAccepted,
    LinkHello,
    LinkOffer,
    LinkRefused,
)
from kvrelay.protocol.messages.messager_to_node import (
    KVArrived,
    KVCancelled,
    KVExpected,
    KVFailed,
    MessagerDumped,
    MessagerReady,
    MessagerStats,
    TransferClosed,
    TransferDone,
    TransferFailed,
)
from kvrelay.protocol.messages.node_to_messager import (
    CachedSignal,
    CancelKV,
    CloseTransfer,
    DumpMessager,
    ExpectKV,
    KVSpan,
    LayerSignal,
    OpenTransfer,
    StopMessager,
)
from kvrelay.protocol.messages.node_to_router import (
    AttemptsHeld,
    DecodeNeeded,
    Drained,
    Dumped,
    Leaving,
    PrefixCacheChanged,
    PrefixCacheReset,
    PromptLogprobsOut,
    Register,
    RequestFailed,
    RequestOutput,
    RequestPreempted,
    RequestTimeline,
    TokensOut,
)
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, RenewReservations, ReserveBlocks
from kvrelay.protocol.messages.router_to_node import (
    Abort,
    AssignDecode,
    Drain,
    Dump,
    Generate,
    Prefill,
    PrefillNodes,
    RegisterAgain,
    Registered,
    RegistrationRefused,
    ResetPrefixCache,
)
from kvrelay.protocol.messages.store_to_store import BlocksDropped, BlocksFetched, DropBlocks, FetchBlocks
from kvrelay.protocol.request import (
    FinishReason,
    Grammar,
    GrammarKind,
    PromptLogprobs,
    RequestSpec,
    SamplingParams,
    TokenLogprobs,
)
from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask
from support.ids import block_ids

_ID: dict[str, Any] = {"request_id": "cmpl-1", "epoch": 2}
_ERROR = ErrorInfo(code="transfer_failed", message="gone", http_status=503, retryable=True)
_GEOMETRY = KVGeometry(4, 2, 8, 16, "bfloat16", "c0ffee")
_D0 = NodeAddress(peer=PeerId("d0#0a1b2c3d"), address="tcp://127.0.0.1:8300")
_LINK = LinkAddress(peer=PeerId("d0-messager#0a1b"), host_id="host", tcp="tcp://127.0.0.1:9000", ipc="ipc:///run/d0")
_SPEC = RequestSpec(
    **_ID,
    prompt_token_ids=[1, 200, 70000],
    output_token_ids=[5],
    priority=-1,
    arrival_s=1_700_000_000.25,
    router=PeerId("router#feed"),
    sampling=SamplingParams(
        max_tokens=64,
        seed=2**63 - 1,
        min_tokens=1,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.2,
        logit_bias={7: -100.0},
        eos_token_ids=[2, 3],
        stop_token_ids=[11],
        ignore_eos=True,
        num_logprobs=1,
        grammar=Grammar(GrammarKind.JSON_SCHEMA, '{"type":"integer"}'),
        num_prompt_logprobs=2,
        token_rules=TokenRules(token_mask([5, 11], 40), BadWords.of([[7], [5, 11], [2, 5, 11]])),
    ),
)
_OUTPUT = RequestOutput(
    **_ID,
    index=1,
    token_ids=[9],
    logprobs=[TokenLogprobs(-0.5, [9, 4], [-0.5, -1.5])],
    finish_reason=FinishReason.STOP,
    stop_token_id=9,
    num_cached_tokens=32,
)
_PROMPT_LOGPROBS = PromptLogprobs(
    1, 1, b"\x02\0\0\0", b"\x07\0\0\0\x09\0\0\0", b"\0\0\0\0\0\0\xf8\xbf\0\0\0\0\0\0\xe0\xbf"
)
_LOAD = Load(
    num_waiting=1,
    num_running=2,
    num_receiving=3,
    num_sending=4,
    free_blocks=5,
    evictable_blocks=6,
    used_blocks=7,
    queued_tokens=8,
    gauges={"reserve_level": 0.7},
    counters={"steps": 9.0},
    prompt_tokens=[8, 0],
    prompt_waits=[PromptWait([1, 2], 0.5)],
    waiting_tokens=10,
    num_preempted=11,
    headroom_blocks=12,
    histograms=[HistogramReport("transfer", "shm", [1, 0, 2], 0.75)],
    prefill_tokens_per_s=13.5,
    link_bytes_per_s={"d0": 1.5e9},
)

EXAMPLES: list[Message] = [
    Heartbeat(load=_LOAD),
    ProtocolViolation(reason="unknown message 'Hello'"),
    Registered(router_incarnation="feed", wants_prefixes=True, wants_attempts=True),
    RegistrationRefused(reason="block_size: 16 != 32"),
    RegisterAgain(),
    PrefillNodes(peers=[PeerId("p0#0a1b2c3d"), PeerId("p1#0a1b2c3d")]),
    Prefill(request=_SPEC, decode_node=_D0),
    AssignDecode(**_ID, decode_node=_D0),
    Generate(request=_SPEC),
    Abort(**_ID),
    Drain(stay_down=True),
    Dump(dump_id="0a1b", with_prompts=True),
    ResetPrefixCache(reset=7),
    Register(
        node_id=NodeId("p0"),
        incarnation="beef",
        role="prefill",
        address="tcp://127.0.0.1:8200",
        pid=42,
        model="demo",
        max_model_len=4096,
        max_num_seqs=64,
        num_blocks=2048,
        geometry=_GEOMETRY,
        session=1,
        vocab_size=151936,
        prefill_order="shortest_first",
        can_dump=True,
        resets_prefix_cache=True,
    ),
    TokensOut(outputs=[_OUTPUT]),
    PromptLogprobsOut(**_ID, logprobs=_PROMPT_LOGPROBS),
    PrefixCacheChanged(number=3, added=b"12345678", removed=b"abcdefgh"),
    AttemptsHeld(attempts=[Attempt(RequestId("cmpl-1"), 2), Attempt(RequestId("cmpl-2"), 1)]),
    RequestFailed(**_ID, error=_ERROR),
    RequestPreempted(**_ID, num_blocks=7),
    DecodeNeeded(**_ID, refused_by=PeerId("d0#0a1b2c3d"), reason="full", retry_after_s=0.1),
    RequestTimeline(**_ID, marks=[Mark("prefill", 1.5, "p0")], layers=[LayerTransfer(0, 1.25, 1.75, 4096)]),
    Leaving(),
    Dumped(dump_id="0a1b", process="d0", path="/run/d0.kvrec", error="none"),
    Drained(),
    PrefixCacheReset(reset=7, num_blocks=300),
    ReserveBlocks(
        **_ID,
        block_hashes=[b"\x00" * 32, b"\xff" * 32],
        num_tokens=40,
        max_tokens=63,
        priority=3,
        router=PeerId("router#feed"),
    ),
    HandOff(request=_SPEC, num_cached_tokens=16, may_be_shared=False),
    RenewReservations(attempts=[Attempt(RequestId("cmpl-1"), 2), Attempt(RequestId("cmpl-2"), 1)]),
    CancelReservation(**_ID, reason="aborted"),
    BlocksReserved(**_ID, block_ids=block_ids(4, 5, 9), num_cached_blocks=1, link=_LINK, lease_s=30.0),
    ReservationRefused(**_ID, reason="full", retry_after_s=None),
    ReservationEnded(**_ID, reason="lease over"),
    LayerSignal(step=7, layer=3, num_layers=2, spans=[KVSpan(RequestId("cmpl-1"), 2, 1, block_ids(8, 9))]),
    CachedSignal(span=KVSpan(RequestId("cmpl-1"), 2, 0, block_ids(3))),
    OpenTransfer(**_ID, link=_LINK, first_block=1, target_block_ids=block_ids(4, 5, 9)),
    CloseTransfer(**_ID),
    ExpectKV(**_ID, first_block=1, target_block_ids=block_ids(4, 5, 9), sender=PeerId("p0.messager#0a1b2c3d")),
    CancelKV(**_ID),
    DumpMessager(router=PeerId("router#feed"), dump_id="0a1b", with_prompts=True),
    StopMessager(),
    MessagerReady(link=_LINK),
    TransferDone(**_ID, num_bytes=8192, link="shm", layers=[LayerTransfer(0, 1.25, 1.75, 8192)]),
    TransferFailed(**_ID, error=_ERROR),
    TransferClosed(**_ID),
    KVExpected(**_ID),
    KVArrived(**_ID, num_bytes=8192),
    KVFailed(**_ID, error=_ERROR),
    KVCancelled(**_ID),
    MessagerDumped(
        router=PeerId("router#feed"), dump_id="0a1b", process="d0.messager", path="/run/d0.kvrec", error="none"
    ),
    MessagerStats(counters={"frames_sent": 3.0}, gauges={"links": 1.0}, link_bytes_per_s={"d0": 1.5e9}),
    LinkHello(geometry=_GEOMETRY, offers=[LinkOffer("shm", b"handle"), LinkOffer("ipc", b"")]),
    LinkAccepted(kind="ipc", credit_bytes=1 << 20, max_frames=16, handle=b"handle", passed_over="shm: no"),
    LinkRefused(reason="dtype: 'bfloat16' != 'float32'", code="geometry_mismatch"),
    KVFrame(
        **_ID,
        layer=3,
        first_block=1,
        target_block_ids=block_ids(4, 5),
        source_block_ids=block_ids(8, 9),
        num_bytes=8192,
        digest=2**64 - 1,
        num_layers=2,
        slot=5,
    ),
    FrameAck(**_ID, layer=3, first_block=1, num_bytes=8192, status=AckStatus.WRITTEN),
    FetchBlocks(fetch_id=7, namespace=b"n" * 16, block_hashes=[b"a" * 32, b"b" * 32]),
    BlocksFetched(fetch_id=7, found=[True, False]),
    DropBlocks(fetch_id=8, namespace=b"n" * 16, block_hashes=[b"a" * 32]),
    BlocksDropped(fetch_id=8, num_blocks=1),
    StepPlan(
        step=12,
        batch=[
            ScheduledTokens(SequenceId(3), 16, 3, True, 17, (9, 70000), True),
            ScheduledTokens(SequenceId(4), 0, 2, False, 0),
        ],
        new=[NewSequence(SequenceId(4), RequestId("cmpl-1"), [1, 200, 70000], 2, _SPEC.sampling, block_ids(0, 8))],
        changed=[SequenceChange(SequenceId(3), block_ids(7), [(0, BlockId(5))], [11])],
        left=[SequenceId(1), SequenceId(2)],
    ),
    StepResult(
        step=12,
        outcomes={
            SequenceId(3): SampledTokens([9, 4], [TokenLogprobs(-0.5, [9, 4], [-0.5, -1.5])], (_PROMPT_LOGPROBS,)),
            SequenceId(4): SequenceFailed("out of memory", retryable=True),
        },
    ),
]

_LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=32),
    types.NoneType: st.none(),
    object: st.text(max_size=20),
    range: st.builds(range, st.integers(0, 9), st.integers(0, 9)),
    memoryview: st.binary(max_size=32).map(lambda data: memoryview(bytes(len(data)))),  # KV is not recorded
    Message: st.sampled_from(EXAMPLES),
    TransferError: st.sampled_from([TransferError("gone"), CorruptKVError("layer 3")]),
    Hashable: st.text(max_size=20) | st.integers(0, 9),
}


def random_values(kind: Any) -> st.SearchStrategy[Any]:
    """Return values of ``kind``: a message, an event, an action, or anything one may be made of."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    kind = getattr(kind, "__supertype__", kind)
    if kind in _LEAVES:
        return _LEAVES[kind]
    if origin is typing.Annotated:
        return _within(*arguments)
    if origin in (list, Sequence):
        return st.lists(random_values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(random_values(arguments[0]), random_values(arguments[1]), max_size=3)
    if origin is tuple and arguments[-1] is ...:
        return st.lists(random_values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(random_values, arguments))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(random_values, arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: random_values(hint) for name, hint in hints.items()})
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    if issubclass(kind, tuple):
        return st.builds(kind, *map(random_values, typing.get_type_hints(kind).values()))
    fields = {field.name: random_values(field.type) for field in msgspec.structs.fields(kind)}
    return st.builds(kind, **fields)


def _within(kind: type[float], bounds: msgspec.Meta) -> st.SearchStrategy[float]:
    """Return numbers with the bounds of ``kvrelay.protocol.quantities``."""
    assert kind is float
    return st.floats(bounds.ge, bounds.le)
