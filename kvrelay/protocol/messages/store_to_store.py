"""KV store -> KV store of another host (backend ``redis`` with ``payload: owner``)."""

from __future__ import annotations

from kvrelay.protocol.messages.base import Message


class FetchBlocks(Message, frozen=True, kw_only=True):
    """Store -> the store of the host that holds these blocks, when a node needs them.

    The reader answers BlocksFetched. It reports all blocks as not found if it is busy, if there are too many, or if the
    namespace is another.
    """

    fetch_id: int
    namespace: bytes
    block_hashes: list[bytes]


class BlocksFetched(Message, frozen=True, kw_only=True):
    """Store -> store, answers FetchBlocks. Payload: a value of ``kvstore.storage.block_format`` per True in ``found``.

    The reader verifies each value before it uses it, and deletes the recorded location of the blocks not found.
    """

    fetch_id: int
    found: list[bool]


class DropBlocks(Message, frozen=True, kw_only=True):
    """Store -> the store of the host that holds these blocks, when they are deleted.

    The reader deletes them and answers BlocksDropped. It deletes nothing where FetchBlocks would find nothing.
    """

    fetch_id: int
    namespace: bytes
    block_hashes: list[bytes]


class BlocksDropped(Message, frozen=True, kw_only=True):
    """Store -> store, answers DropBlocks. ``num_blocks`` were deleted.

    The reader adds them to its result.
    """

    fetch_id: int
    num_blocks: int
