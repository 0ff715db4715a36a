"""Block hashes: chained, full blocks only, the same everywhere and for ever."""

import hashlib
import os
import struct
import subprocess
import sys

import pytest

from kvrelay.errors import LocalProtocolError
from kvrelay.protocol.block_hash import HASH_BYTES, BlockHasher

TOKENS = [0, 1, 2, 3, 4, 5, 6, 2**32 - 1, 9]

GOLDEN = [
    "76d33df7ba55bcfbfb088f4479f2d6ec5c69abe4935d6e40da081732f27260a5",
    "6bc75e380fba284c7de7a6c3b6d048e661bc266d99955380e22120e676d0c724",
]


def test_golden_hashes() -> None:
    hasher = BlockHasher("digest", block_size=4, salt="salt")
    assert [block_hash.hex() for block_hash in hasher.hashes(TOKENS)] == GOLDEN


def test_hashes_follow_the_documented_formula() -> None:
    def sha256(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    root = sha256(sha256(b"digest") + sha256(b"salt"))
    first = sha256(root + struct.pack("<4I", *TOKENS[:4]))
    second = sha256(first + struct.pack("<4I", *TOKENS[4:8]))
    assert BlockHasher("digest", block_size=4, salt="salt").hashes(TOKENS) == [first, second]


@pytest.mark.fault("F29")
def test_another_process_with_another_hash_seed_computes_the_same() -> None:
    program = (
        "from kvrelay.protocol.block_hash import BlockHasher\n"
        f"print([h.hex() for h in BlockHasher('digest', 4, 'salt').hashes({TOKENS})])"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": "12345"}, text=True
    )
    assert printed.strip() == str(GOLDEN)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (9, 2)])
def test_only_full_blocks_have_a_hash(num_tokens: int, num_blocks: int) -> None:
    hashes = BlockHasher("digest", block_size=4).hashes(TOKENS[:num_tokens])
    assert len(hashes) == num_blocks
    assert all(len(block_hash) == HASH_BYTES for block_hash in hashes)


def test_a_hash_depends_on_every_token_before_it() -> None:
    hasher = BlockHasher("digest", block_size=2)
    one, other = hasher.hashes([1, 2, 3, 4, 5, 6]), hasher.hashes([1, 2, 9, 4, 5, 6])
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert one[2] != other[2], "equal tokens after another prefix are another block"


@pytest.mark.parametrize(
    "other",
    [BlockHasher("other", 2, "salt"), BlockHasher("digest", 2, "other"), BlockHasher("digestsalt", 2, "")],
    ids=["model", "salt", "boundary"],
)
def test_model_and_salt_keep_hashes_apart(other: BlockHasher) -> None:
    assert BlockHasher("digest", 2, "salt").hashes([1, 2]) != other.hashes([1, 2])


def test_extend_appends_what_became_full() -> None:
    hasher = BlockHasher("digest", block_size=4)
    hashes: list[bytes] = []
    for num_tokens in range(len(TOKENS) + 1):
        hasher.extend(hashes, TOKENS[:num_tokens])
        assert hashes == hasher.hashes(TOKENS[:num_tokens])


def test_extend_refuses_hashes_of_blocks_that_are_not_there() -> None:
    hasher = BlockHasher("digest", block_size=4)
    with pytest.raises(LocalProtocolError, match="2 block hashes for 7 tokens, which fill only 1 blocks"):
        hasher.extend(hasher.hashes(TOKENS), TOKENS[:7])


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5])
def test_a_token_that_is_no_u32_is_refused_and_changes_nothing(bad: int) -> None:
    hashes: list[bytes] = []
    with pytest.raises(LocalProtocolError, match="token ids"):
        BlockHasher("digest", block_size=2).extend(hashes, [1, 2, bad, 4])
    assert hashes == []
