"""Between the KV stores of different hosts."""

from __future__ import annotations

from kvrelay.protocol.messages.base import Message


class FetchBlocks(Message, frozen=True, kw_only=True):
    """Store -> the store of the host that holds these blocks, when somebody here wants them.

    The reader answers with BlocksFetched, whatever it has of them.
    """

    fetch_id: int
    namespace: bytes
    block_hashes: list[bytes]


class BlocksFetched(Message, frozen=True, kw_only=True):
    """Store -> store, the answer to FetchBlocks. Payload: a value of ``kvstore.storage.block_format`` for each True.

    The reader checks each value before it uses it, and forgets where the others were said to be.
    """

    fetch_id: int
    found: list[bool]


class DropBlocks(Message, frozen=True, kw_only=True):
    """Store -> the store of the host that holds these blocks, when they are deleted.

    The reader deletes them and answers with BlocksDropped.
    """

    fetch_id: int
    namespace: bytes
    block_hashes: list[bytes]


class BlocksDropped(Message, frozen=True, kw_only=True):
    """Store -> store, the answer to DropBlocks.

    The reader adds up how many blocks there were.
    """

    fetch_id: int
    num_blocks: int
