"""A consumer of KV events, which keeps what a node's prefix cache has: by the bytes of messages alone."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from kvrelay.machine.contract import PublishKVEvents
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.kv_events import KVEventBatch, event_hashes


class KVSubscriber:
    """Takes payloads in order. ``blocks``: each published block with its parent and its tokens, by hash."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: dict[int, tuple[int | None, list[int]]] = {}
        self.num_events = 0
        self.last_s = 0.0

    def take(self, payload: bytes) -> None:
        """Take one message."""
        at_s, events, rank = msgpack.unpackb(payload)
        assert rank == 0
        assert at_s >= self.last_s
        self.last_s = at_s
        for event in events:
            self._take(event)

    def take_action(self, action: PublishKVEvents) -> None:
        """Take what a machine wants published."""
        self.take(msgspec.msgpack.encode(KVEventBatch(action.at_s, list(action.events))))

    def _take(self, event: list[Any]) -> None:
        self.num_events += 1
        match event:
            case ["BlockStored", hashes, parent, token_ids, self.block_size, None, "GPU", None]:
                assert len(token_ids) == len(hashes) * self.block_size > 0
                assert parent is None or parent in self.blocks, "the block before is not published"
                for index, block_hash in enumerate(hashes):
                    assert block_hash not in self.blocks, "it is published already"
                    first = index * self.block_size
                    self.blocks[block_hash] = parent, token_ids[first : first + self.block_size]
                    parent = block_hash
            case ["BlockRemoved", hashes, "GPU"]:
                for block_hash in hashes:
                    del self.blocks[block_hash]
            case ["AllBlocksCleared"]:
                self.blocks.clear()
            case _:
                raise AssertionError(f"not an event of vLLM: {event}")

    def prompt_of(self, block_hash: int) -> list[int]:
        """Return all tokens up to the end of a block."""
        parent, token_ids = self.blocks[block_hash]
        return token_ids if parent is None else self.prompt_of(parent) + token_ids

    def check_hashes(self, hasher: BlockHasher) -> None:
        """Compare each block's hash with that of its tokens and all before them."""
        for block_hash in self.blocks:
            assert event_hashes(hasher.hashes(self.prompt_of(block_hash)))[-1] == block_hash
