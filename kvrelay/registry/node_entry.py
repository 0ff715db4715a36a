"""The entry of a node in the registry."""

from __future__ import annotations

import msgspec

from kvrelay.addresses import split_tcp_address
from kvrelay.errors import RemoteProtocolError
from kvrelay.machine.membership import DRAINING
from kvrelay.protocol.ids import PeerId, peer_id
from kvrelay.protocol.messages.node_to_router import Register

MAX_ENTRY_BYTES = 64 << 10
"""Maximum size of an entry."""


class NodeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One incarnation of a node: its registration, its state, and when it was started (wall-clock)."""

    registration: Register
    state: str
    started_s: float

    @property
    def peer(self) -> PeerId:
        """Its peer id."""
        return peer_id(self.registration.node_id, self.registration.incarnation)

    @property
    def address(self) -> str:
        """Its listening address."""
        return self.registration.address

    @property
    def is_draining(self) -> bool:
        """Whether it accepts no new requests."""
        return self.state == DRAINING


def pack_entry(entry: NodeEntry) -> bytes:
    """Return ``entry`` as JSON, which is readable in Redis."""
    return msgspec.json.encode(entry)


def unpack_entry(data: bytes) -> NodeEntry:
    """Return the entry in ``data``. Raises RemoteProtocolError if it is invalid."""
    if len(data) > MAX_ENTRY_BYTES:
        raise RemoteProtocolError(f"{len(data)} bytes, the limit is {MAX_ENTRY_BYTES}")
    try:
        entry = msgspec.json.decode(data, type=NodeEntry)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(str(error)) from error
    if not _is_address(entry.address):
        raise RemoteProtocolError(f"no address of a node: {entry.address!r:.100}")
    return entry


def _is_address(address: str) -> bool:
    try:
        _, port = split_tcp_address(address)
    except ValueError:
        return False
    return port > 0


def present(entries: list[NodeEntry]) -> list[NodeEntry]:
    """Return ``entries`` by start time, without those whose address a later incarnation uses."""
    ordered = sorted(entries, key=lambda entry: (entry.started_s, entry.peer))
    last = {entry.address: entry.peer for entry in ordered}
    return [entry for entry in ordered if last[entry.address] == entry.peer]
