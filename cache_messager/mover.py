"""Performs the messager-specific actions of the machine with the links."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from msgspec import MsgspecError

from cache_messager.links import link_class
from cache_messager.links.interface import KVLink
from cache_messager.settings import MessagerSettings
from cache_messager.work import (
    AcceptLink,
    DeviceLost,
    DropLink,
    FrameSent,
    LeaveLink,
    LinkReady,
    OpenLink,
    SendFrame,
    WriteBlocks,
)
from kvrelay.errors import DeviceError, KVRelayError
from kvrelay.kv_pool.interface import KVPool
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.messages.messager_to_messager import KVFrame, LinkOffer
from kvrelay.runtime.logging import log_event


class Sends(Protocol):
    """The part of Transport used here."""

    def send(self, peer: PeerId, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Send ``message``. Called on the loop's thread."""


class Posts(Protocol):
    """The part of Shell used here."""

    def handle_with(self, kind: type, handler: Callable[[Any], None]) -> None:
        """Register ``handler`` for actions of type ``kind``."""

    def post(self, event: object) -> None:
        """Queue ``event``. Called on the loop's thread."""

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        """Run ``call`` on the loop's thread. Called from any thread."""


class BlockMover:
    """The links of one messager, and their ``links.interface.LinkHost``.

    Created and used on the loop's thread, except ``send`` and ``post``, which are called from any thread.
    """

    def __init__(self, settings: MessagerSettings, pool: KVPool) -> None:
        self.pool = pool
        self.checksum = settings.checksum
        self.peer_timeout_s = settings.peer_timeout_s
        self.is_only_kind = len(settings.links) == 1
        self._links: dict[str, KVLink] = {kind: link_class(kind)(self) for kind in settings.links}
        self._accepted: dict[int, KVLink] = {}
        self._thread = threading.get_ident()
        self._transport: Sends
        self._shell: Posts

    @property
    def offers(self) -> list[LinkOffer]:
        """The offers of this sender: the kinds of link possible in this process, fastest first."""
        offers = ((kind, link.offer()) for kind, link in self._links.items())
        return [LinkOffer(kind, handle) for kind, handle in offers if handle is not None]

    def serve(self, transport: Sends, shell: Posts) -> None:
        """Register the handlers of the messager-specific actions with ``shell``."""
        self._transport, self._shell = transport, shell
        shell.handle_with(SendFrame, self._unless_lost(self._send_frame))
        shell.handle_with(AcceptLink, self._unless_lost(self._accept))
        shell.handle_with(WriteBlocks, self._unless_lost(self._write))
        shell.handle_with(DropLink, self._drop)
        shell.handle_with(OpenLink, lambda action: self._link(action.kind).open(action.peer, action.handle))
        shell.handle_with(LeaveLink, lambda action: self._link(action.kind).leave(action.peer))

    def _unless_lost(self, perform: Callable[[Any], None]) -> Callable[[Any], None]:
        """Wrap ``perform``: a DeviceError posts DeviceLost, which ends the machine without another answer."""

        def handler(action: Any) -> None:
            try:
                perform(action)
            except DeviceError as error:
                self.post(DeviceLost(error.message))

        return handler

    # ------------------------------------------------------------ for the machine

    def _send_frame(self, action: SendFrame) -> None:
        self._link(action.kind).send(action.peer, action.frame, action.source_block_ids)

    def _accept(self, action: AcceptLink) -> None:
        reasons: list[str] = []
        for offer in action.offers:
            try:
                link = self._link(offer.kind)
                handle = link.accept(action.link_id, offer.handle)
            except DeviceError:
                raise
            except (KVRelayError, MsgspecError, OSError, ValueError, RecursionError) as error:
                reasons.append(f"{offer.kind}: {error}")
                log_event("warning", "link not possible", {"kind": offer.kind, "reason": error})
                continue
            self._accepted[action.link_id] = link
            passed_over = "; ".join(reasons)
            self.post(LinkReady(action.link_id, offer.kind, passed_over, max_frames=link.max_frames, handle=handle))
            return
        self.post(LinkReady(action.link_id, None, "; ".join(reasons) or "no link was offered"))

    def _write(self, action: WriteBlocks) -> None:
        self._accepted[action.link_id].write(action.link_id, action.frame, action.payload)

    def _drop(self, action: DropLink) -> None:
        self._accepted.pop(action.link_id).drop(action.link_id)

    def _link(self, kind: str) -> KVLink:
        """Return the links of ``kind``. A receiver also accepts kinds that its own config does not offer."""
        if kind not in self._links:
            self._links[kind] = link_class(kind)(self)
        return self._links[kind]

    # ------------------------------------------------------------ for links

    def send(self, peer: PeerId, frame: KVFrame, payload: Sequence[memoryview] = ()) -> None:
        if threading.get_ident() != self._thread:
            self._shell.call_threadsafe(lambda: self.send(peer, frame, payload))
            return
        self._transport.send(peer, frame, payload)
        self._shell.post(FrameSent(frame))

    def post(self, event: object) -> None:
        if threading.get_ident() == self._thread:
            self._shell.post(event)
        else:
            self._shell.call_threadsafe(lambda: self._shell.post(event))

    def close(self) -> None:
        """Release the resources of all links."""
        for link in self._links.values():
            link.close()
