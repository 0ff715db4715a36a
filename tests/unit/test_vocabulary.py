"""The small parts of the core: ids, geometry, requests, lifecycles, liveness, membership, errors, clock."""

from __future__ import annotations

import re
import time
from enum import StrEnum
from typing import Any

import msgspec
import pytest

from kvrelay import errors
from kvrelay.errors import KVRelayError, LocalProtocolError, QueueFullError
from kvrelay.machine.clock import Clock
from kvrelay.machine.lifecycle import Lifecycle
from kvrelay.machine.liveness import Liveness
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import Attempt, NodeId, PeerId, RequestId, new_incarnation, peer_id, peer_name
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.request import FinishReason, RequestSpec, SamplingParams, Sequence

GEOMETRY = KVGeometry(4, 2, 8, 16, "bfloat16", "digest")
REGISTER = Register(
    node_id=NodeId("d0"),
    incarnation="1",
    role="decode",
    address="tcp://127.0.0.1:1",
    pid=1,
    model="demo",
    max_model_len=64,
    max_num_seqs=4,
    num_blocks=8,
    geometry=GEOMETRY,
)

# ---------------------------------------------------------------- ids, geometry, clock


def test_peers_are_names_with_an_incarnation() -> None:
    assert peer_id("d0", "abcd") == "d0#abcd"
    assert peer_name(PeerId("d0#abcd")) == peer_name(PeerId("d0")) == "d0"
    assert len({new_incarnation() for _ in range(100)}) == 100


def test_sizes_of_blocks() -> None:
    assert GEOMETRY.plane_block_bytes == 16 * 2 * 8 * 2
    assert GEOMETRY.layer_block_bytes == 2 * GEOMETRY.plane_block_bytes
    assert GEOMETRY.block_bytes == 4 * GEOMETRY.layer_block_bytes
    assert [GEOMETRY.blocks_for(tokens) for tokens in (0, 1, 15, 16, 17, 32)] == [0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("field", KVGeometry.__struct_fields__)
def test_every_field_of_a_geometry_tells_two_apart(field: str) -> None:
    value = getattr(GEOMETRY, field)
    other = msgspec.structs.replace(GEOMETRY, **{field: value + 1 if isinstance(value, int) else value + "x"})
    [line] = GEOMETRY.differences(other)
    assert line == f"{field}: {value!r} != {getattr(other, field)!r}"
    assert GEOMETRY.differences(GEOMETRY) == []


def test_clock_is_wall_time_that_never_goes_back() -> None:
    clock = Clock()
    assert abs(clock.now() - time.time()) < 1
    times = [clock.now() for _ in range(100)]
    assert times == sorted(times)


# ---------------------------------------------------------------- requests


def sequence(output: list[int], **sampling: Any) -> Sequence:
    params = SamplingParams(**{"max_tokens": 4, "seed": 0, "eos_token_ids": [2], "stop_token_ids": [9], **sampling})
    spec = RequestSpec(
        request_id=RequestId("r"), epoch=1, prompt_token_ids=[1, 2, 9], sampling=params, output_token_ids=output
    )
    return Sequence(spec)


@pytest.mark.parametrize(
    ("output", "sampling", "reason"),
    [
        ([5], {}, None),
        ([5, 5, 5, 5], {}, (FinishReason.LENGTH, None)),
        ([5], {"max_tokens": 1}, (FinishReason.LENGTH, None)),
        ([2], {}, (FinishReason.STOP, None)),
        ([9], {}, (FinishReason.STOP, 9)),
        ([2], {"ignore_eos": True}, None),
        ([9], {"ignore_eos": True}, (FinishReason.STOP, 9)),
        ([2], {"min_tokens": 2}, None),
        ([9, 9], {"min_tokens": 2}, None),
        ([9, 9, 9], {"min_tokens": 2}, (FinishReason.STOP, 9)),
        ([5, 5, 5, 2], {}, (FinishReason.STOP, None)),
        ([5, 5, 5, 2], {"ignore_eos": True}, (FinishReason.LENGTH, None)),
        ([5, 5, 5, 9], {"min_tokens": 4}, (FinishReason.STOP, 9)),
        ([2], {"eos_token_ids": []}, None),
    ],
)
def test_finish_reason(output: list[int], sampling: dict[str, Any], reason: object) -> None:
    assert sequence(output, **sampling).finish_reason() == reason


def test_a_sequence_goes_on_behind_what_was_delivered() -> None:
    resumed = sequence([5, 6])
    assert resumed.token_ids == [1, 2, 9, 5, 6]
    assert (resumed.num_prompt_tokens, resumed.num_output_tokens, resumed.num_tokens) == (3, 2, 5)
    assert resumed.attempt == Attempt(RequestId("r"), 1)


def test_sequences_do_not_share_lists_with_their_spec() -> None:
    first = sequence([5])
    first.token_ids.append(7)
    assert first.spec.output_token_ids == [5]
    assert first.spec.prompt_token_ids == [1, 2, 9]


# ---------------------------------------------------------------- lifecycle


class Light(StrEnum):
    RED = "red"
    GREEN = "green"
    OFF = "off"


TABLE = {
    Light.RED: frozenset({Light.GREEN}),
    Light.GREEN: frozenset({Light.RED, Light.OFF}),
    Light.OFF: frozenset[Light](),
}


def test_a_lifecycle_moves_along_its_table_and_remembers() -> None:
    light = Lifecycle("light", TABLE, Light.RED, 1.0)
    light.move(Light.GREEN, 2.0)
    light.move(Light.OFF, 3.0)
    assert light.status is Light.OFF
    assert light.history == [(Light.RED, 1.0), (Light.GREEN, 2.0), (Light.OFF, 3.0)]


def test_an_illegal_step_raises_with_the_story_and_changes_nothing() -> None:
    light = Lifecycle("light 7", TABLE, Light.RED, 1.0)
    light.move(Light.GREEN, 2.0)
    with pytest.raises(LocalProtocolError, match="light 7: red -> green -> green is not a legal step"):
        light.move(Light.GREEN, 3.0)
    assert light.status is Light.GREEN
    light.move(Light.OFF, 4.0)
    with pytest.raises(LocalProtocolError):
        light.move(Light.RED, 5.0)


# ---------------------------------------------------------------- liveness


def test_a_peer_is_lost_after_the_timeout_and_only_once() -> None:
    liveness = Liveness(peer_timeout_s=5.0)
    liveness.watch(PeerId("d0"), 0.0)
    liveness.watch(PeerId("d1"), 3.0)
    assert liveness.lost(4.9) == []
    assert liveness.lost(5.0) == ["d0"]
    assert liveness.lost(7.9) == []
    assert PeerId("d0") not in liveness
    assert liveness.lost(8.0) == ["d1"]
    assert liveness.peers == []


def test_signs_of_life_put_the_deadline_off() -> None:
    liveness = Liveness(peer_timeout_s=5.0)
    liveness.watch(PeerId("d0"), 0.0)
    liveness.record_message(PeerId("d0"), 4.0)
    liveness.watch(PeerId("d0"), 4.5)  # watching again is not a sign of life
    assert liveness.lost(8.9) == []
    assert liveness.lost(9.0) == ["d0"]


def test_a_word_from_somebody_not_watched_changes_nothing() -> None:
    liveness = Liveness(peer_timeout_s=5.0)
    liveness.record_message(PeerId("stranger"), 0.0)
    assert PeerId("stranger") not in liveness
    liveness.watch(PeerId("d0"), 0.0)
    liveness.forget(PeerId("d0"))
    liveness.forget(PeerId("d0"))
    assert liveness.lost(100.0) == []


# ---------------------------------------------------------------- errors


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([│├└─ ]*)(\w+Error)\b", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            drawn[match[2]] = path[depth - 1] if depth else "Exception"
    classes = {
        name: kind.__mro__[1].__name__
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, KVRelayError)
    }
    assert drawn == classes


def test_the_tree_gives_the_http_status() -> None:
    text = errors.__doc__ or ""
    drawn = dict(re.findall(r"(\w+Error)\b[^\n]*\((\d{3})\)", text))
    assert len(drawn) >= 7
    assert {name: str(getattr(errors, name).http_status) for name in drawn} == drawn


def test_every_error_has_a_code_of_its_own_kind() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KVRelayError)]
    protocol = {errors.LocalProtocolError, errors.RemoteProtocolError}
    codes = [kind.code for kind in kinds if kind not in protocol]
    assert len(set(codes)) == len(codes)


def test_an_error_crosses_the_wire_with_all_that_matters() -> None:
    info = ErrorInfo.of(errors.CorruptKVError("block 3", request_id="r"))
    assert info == ErrorInfo(code="corrupt_kv", message="block 3", http_status=503, retryable=True)
    assert ErrorInfo.of(errors.GeometryMismatchError("x")).retryable is False
    assert QueueFullError("full", retry_after_s=2.5).retry_after_s == 2.5
    assert errors.ConfigError(["a", "b"]).message == "a\nb"
