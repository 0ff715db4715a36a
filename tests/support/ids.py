"""Ids written as literals."""

from kvrelay.protocol.ids import BlockId


def block_ids(*ids: int) -> list[BlockId]:
    """Return ``ids`` as block ids."""
    return [BlockId(index) for index in ids]
