"""Values and keys are the same on every host, in every process and on every day."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from storage_rooms import GEOMETRY as PRESENT
from storage_rooms import HASHES, planes

from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.block_format import HEADER_BYTES, BlockFormat, is_intact, namespace_of

GEOMETRY = msgspec.structs.replace(PRESENT, protocol_version=1)
"""The same whatever the version of the protocol is, which changes the namespaces of new blocks."""

NAMESPACE = "370c72653f9afe7eb7dbfa23895692ff"
HEADER = (
    "4b56524201000000370c72653f9afe7eb7dbfa23895692ff84b07a99371d27459deacb358e49dbff"
    "99e92219f178ded59cb0b732b7b97a2ec0000000000000001a0abdd2544c5f896def048c3de5da3f"
)


def sealed(block_hash: bytes = HASHES[0]) -> np.ndarray:
    kv = BlockFormat(GEOMETRY)
    value = np.empty(kv.value_bytes, np.uint8)
    kv.payload(value)[...] = np.arange(GEOMETRY.block_bytes, dtype=np.uint8).reshape(kv.block_shape)
    kv.seal(value, block_hash)
    return value


def test_golden_value() -> None:
    assert namespace_of(GEOMETRY).hex() == NAMESPACE
    assert sealed()[:HEADER_BYTES].tobytes().hex() == HEADER


@pytest.mark.fault("F29")
def test_namespaces_are_the_same_in_another_process() -> None:
    script = f"""
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.block_format import namespace_of
print(namespace_of({GEOMETRY!r}).hex())
"""
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == NAMESPACE


@pytest.mark.parametrize("field", KVGeometry.__struct_fields__)
def test_every_field_of_the_geometry_is_in_the_namespace(field: str) -> None:
    value = getattr(GEOMETRY, field)
    other = msgspec.structs.replace(GEOMETRY, **{field: value + 1 if isinstance(value, int) else value + "x"})
    assert namespace_of(other) != namespace_of(GEOMETRY)


def test_every_single_byte_counts() -> None:
    value = sealed()
    assert BlockFormat(GEOMETRY).is_good(value, HASHES[0])
    assert is_intact(value)
    for index in range(len(value)):
        value[index] ^= 1
        assert not BlockFormat(GEOMETRY).is_good(value, HASHES[0])
        assert not is_intact(value)
        value[index] ^= 1
    assert BlockFormat(GEOMETRY).is_good(value, HASHES[0])


def test_every_length_counts() -> None:
    value = sealed()
    for length in range(len(value)):
        assert not BlockFormat(GEOMETRY).is_good(value[:length], HASHES[0])
        assert not is_intact(value[:length])
    assert not is_intact(np.concatenate([value, value[:1]]))


def test_a_good_value_is_good_only_as_what_it_is() -> None:
    other = msgspec.structs.replace(GEOMETRY, model_digest="other")
    assert not BlockFormat(GEOMETRY).is_good(sealed(HASHES[1]), HASHES[0])
    assert not BlockFormat(other).is_good(sealed(), HASHES[0])


def test_the_payload_is_a_view_of_the_block() -> None:
    kv = BlockFormat(GEOMETRY)
    value = np.zeros(kv.value_bytes, np.uint8)
    kv.payload(value)[...] = planes(1)[:, :, 0]
    assert value[HEADER_BYTES:].tobytes() == planes(1)[:, :, 0].tobytes()
