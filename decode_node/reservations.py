"""Reservations of prefill nodes on D: blocks, arriving KV, hand-offs, leases."""

from __future__ import annotations

from typing import NamedTuple

from decode_node.admission import Admission
from decode_node.publishing import Publisher
from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import (
    KVRelayError,
    LocalProtocolError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
)
from kvrelay.machine.contract import Log
from kvrelay.machine.liveness import Liveness
from kvrelay.machine.outbox import Outbox
from kvrelay.node.endings import Endings
from kvrelay.node.request import Holder
from kvrelay.protocol.ids import MESSAGER, Attempt, PeerId, messager_of, peer_name
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, LinkAddress
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.node_to_messager import ExpectKV
from kvrelay.protocol.messages.prefill_to_decode import HandOff, ReserveBlocks
from kvstore.blocks.kv_cache import KVCache

RETRY_AFTER_S = 0.1
"""After how many seconds P may ask again when there was no room: a few decode steps."""


class Refusal(NamedTuple):
    """Why a reservation is not granted, and when to ask again; None: never."""

    reason: str
    retry_after_s: float | None


class Reservations:
    """Answers all prefill nodes. ``link`` is where the messager takes frames, once it is up.

    It moves requests while they are RESERVING or RECEIVING, up to RUNNING_DECODE. The machine reports each message of a
    prefill node and of the messager, and calls ``heartbeat`` at each heartbeat.
    """

    def __init__(
        self,
        node: NodeConfig,
        kv: KVCache,
        requests: Requests,
        endings: Endings[DecodeRequest, DecodeStatus],
        admission: Admission,
        publisher: Publisher,
        outbox: Outbox,
    ) -> None:
        self._kv = kv
        self._requests = requests
        self._endings = endings
        self._admission = admission
        self._publisher = publisher
        self._outbox = outbox
        self._lease_s = node.transfer.lease_s
        self._block_size = node.cache.block_size
        self._alive = Liveness(node.cluster.peer_timeout_s)
        self._prefill_nodes: dict[PeerId, frozenset[PeerId]] | None = None
        self.refused_a_stranger = False
        """A prefill node that no router has named asked for blocks: PrefillNodes may have been lost."""
        self.link: LinkAddress | None = None
        self.counters = {"reservations_refused": 0.0, "reservations_expired": 0.0, "kv_bytes_received": 0.0}

    def record_message(self, peer: PeerId) -> None:
        """Note that a message of ``peer`` arrived."""
        self._alive.record_message(peer, self._outbox.now)

    def resumed(self, paused_s: float) -> None:
        """This process did not run for ``paused_s``: renewals of leases may be unread, and the like."""
        self._alive.resumed(paused_s, self._outbox.now)
        for request in self._requests.receiving:
            request.lease_until_s += paused_s

    # ------------------------------------------------------------ who may reserve

    def introduce(self, router: PeerId, prefill_nodes: list[PeerId]) -> None:
        """Grant reservations only to the ``prefill_nodes`` of ``router`` and of other routers."""
        self._prefill_nodes = {**(self._prefill_nodes or {}), router: frozenset(prefill_nodes)}

    def router_lost(self, router: PeerId) -> None:
        """Forget the prefill nodes of ``router``."""
        if self._prefill_nodes is not None:
            self._prefill_nodes.pop(router, None)

    def _is_introduced(self, peer: PeerId) -> bool:
        """Return whether a router has named ``peer``. A router of an earlier version names none: then anybody may."""
        return self._prefill_nodes is None or any(peer in peers for peers in self._prefill_nodes.values())

    # ------------------------------------------------------------ reserving

    def reserve(self, peer: PeerId, message: ReserveBlocks, inadmissible: ErrorInfo | None) -> None:
        """Set blocks aside for ``peer``, or refuse; ``inadmissible``: why the node takes no such request, if so."""
        attempt = Attempt(message.request_id, message.epoch)
        known = self._requests.find(attempt)
        if known is not None and known.sender == peer and known.is_reserved:
            self._repeat_answer(known)
            return
        if not self._is_introduced(peer):
            self.refused_a_stranger = True
            refusal: Refusal | None = Refusal("no router has named the prefill node yet", RETRY_AFTER_S)
        else:
            refusal = self._refusal(known, message, inadmissible) or self._try_reserve(peer, message)
        if refusal is not None:
            self.counters["reservations_refused"] += 1
            refused = ReservationRefused(
                request_id=attempt.request_id,
                epoch=attempt.epoch,
                reason=refusal.reason,
                retry_after_s=refusal.retry_after_s,
            )
            self._outbox.send(peer, refused)

    def _refusal(
        self, known: DecodeRequest | None, message: ReserveBlocks, inadmissible: ErrorInfo | None
    ) -> Refusal | None:
        """Return why the reservation cannot be granted whatever is free."""
        if not 0 <= len(message.block_hashes) * self._block_size <= message.num_tokens:
            return Refusal(f"{len(message.block_hashes)} block hashes do not fit {message.num_tokens} tokens", None)
        if self.link is None:
            return Refusal("the cache messager is not up yet", RETRY_AFTER_S)
        if known is not None:
            return Refusal("an earlier reservation for this request is still being given up", RETRY_AFTER_S)
        if inadmissible is not None:
            return Refusal(inadmissible.message, RETRY_AFTER_S if inadmissible.retryable else None)
        reason = self._admission.may_reserve(message.priority, message.num_tokens, self._outbox.now)
        return None if reason is None else Refusal(reason, RETRY_AFTER_S)

    def _try_reserve(self, peer: PeerId, message: ReserveBlocks) -> Refusal | None:
        """Give the reservation its blocks and have the messager expect KV in them, if there is room."""
        request = DecodeRequest.reserved(message, peer, self._outbox.now)
        kv = self._kv
        matched = kv.match(message.block_hashes)
        num_new = -(-message.num_tokens // self._block_size) - len(matched)
        if not self._admission.fits(request, num_new, matched):
            return Refusal(f"{num_new} KV blocks are not free beside what running requests need", RETRY_AFTER_S)
        kv.pin(matched)
        request.take_blocks([*matched, *kv.allocate(num_new)])
        request.num_cached_blocks = len(matched)
        request.num_matched_tokens = len(matched) * self._block_size
        kv.record_query(message.num_tokens, request.num_matched_tokens)
        request.lease_until_s = self._outbox.now + self._lease_s
        self._requests.add(request)
        self._requests.order.passed(message.priority, message.num_tokens)
        self._alive.watch(peer, self._outbox.now)
        expect = ExpectKV(
            request_id=message.request_id,
            epoch=message.epoch,
            first_block=len(matched),
            target_block_ids=request.block_table[len(matched) :],
            sender=messager_of(peer),
        )
        self._outbox.send(MESSAGER, expect)
        return None

    def expected(self, request: DecodeRequest) -> None:
        """The messager takes frames for the blocks from now on: tell P of them, which may not know them earlier."""
        self._requests.move(request, DecodeStatus.RECEIVING, self._outbox.now)
        request.mark("reserved", self._outbox.now)
        self._send_reserved(request)
        self._begin_if_ready(request)

    def _repeat_answer(self, request: DecodeRequest) -> None:
        """Answer P, which has asked twice for one reservation. Before the messager is ready ``expected`` will."""
        if request.status is DecodeStatus.RECEIVING:
            self._send_reserved(request)

    def _send_reserved(self, request: DecodeRequest) -> None:
        if self.link is None or request.sender is None:
            raise LocalProtocolError("a reservation without messager or sender", request_id=request.spec.request_id)
        reserved = BlocksReserved(
            request_id=request.spec.request_id,
            epoch=request.spec.epoch,
            block_ids=request.block_table[request.num_cached_blocks :],
            num_cached_blocks=request.num_cached_blocks,
            link=self.link,
            lease_s=self._lease_s,
        )
        self._outbox.send(request.sender, reserved)

    # ------------------------------------------------------------ taking over

    def arrived(self, request: DecodeRequest, num_bytes: int) -> None:
        """All KV is here and verified."""
        request.kv_arrived = True
        request.holders.discard(Holder.MESSAGER)
        request.mark("kv_arrived", self._outbox.now)
        self.counters["kv_bytes_received"] += num_bytes
        self._begin_if_ready(request)

    def kv_failed(self, request: DecodeRequest, error: ErrorInfo) -> None:
        """The transfer is over without success."""
        self._endings.release(request, Holder.MESSAGER)
        if not request.is_over:
            self.give_up(request, error)

    def hand_off(self, peer: PeerId, message: HandOff, wrong: KVRelayError | None) -> None:
        """Take the request over, or tell both P and the router why not; ``wrong``: why it can be served nowhere."""
        spec = message.request
        request = self._requests.find(spec.attempt)
        if request is not None and request.sender != peer:
            self._outbox.send(peer, _ended(spec.attempt, "the reservation is another's"))
        elif request is None or request.is_over:
            self._outbox.send(peer, _ended(spec.attempt, "no such reservation"))
            self._endings.report(spec, ErrorInfo.of(TransferError("handed off without a reservation")))
        elif wrong is not None:
            self.give_up(request, ErrorInfo.of(wrong))
        elif not request.accepts(spec):
            self.give_up(request, ErrorInfo.of(TransferError("handed off with another length than reserved")))
        elif not request.handed_off:
            request.hand_off(message)
            if not message.may_be_shared:
                self._kv.keep_back(request.block_table[request.num_cached_blocks :])
            request.mark("handed_off", self._outbox.now)
            self._begin_if_ready(request)

    def _begin_if_ready(self, request: DecodeRequest) -> None:
        """Let ``request`` decode, and others share its blocks, once it has both its KV and its hand-off.

        KV may arrive whole and as it was sent from a prompt that fails on P in the step that computed it: the hand-off
        is P's word that it is good.
        """
        if request.status is DecodeStatus.RECEIVING and request.kv_arrived and request.handed_off:
            self._publisher.publish_blocks(request, len(request.hashes))
            self._requests.move(request, DecodeStatus.RUNNING_DECODE, self._outbox.now)
            request.mark("decode", self._outbox.now)

    # ------------------------------------------------------------ giving up

    def give_up(self, request: DecodeRequest, error: ErrorInfo) -> None:
        """End ``request`` with ``error``, and tell the prefill node it came from, if there is one."""
        if request.sender is not None:
            self._outbox.send(request.sender, _ended(request.attempt, error.message))
        self._endings.fail(request, error)

    def renew(self, peer: PeerId, attempts: list[Attempt]) -> None:
        """Renew the leases that ``peer`` names; tell it which of those reservations do not exist."""
        for attempt in attempts:
            request = self._requests.find(attempt)
            if request is None:
                self._outbox.send(peer, _ended(attempt, "no such reservation"))
            elif request.sender == peer:
                request.lease_until_s = self._outbox.now + self._lease_s

    def heartbeat(self) -> None:
        """End reservations whose lease is over and those of silent prefill nodes; send the others a heartbeat."""
        now, receiving = self._outbox.now, self._requests.receiving
        overdue = [request for request in receiving if request.lease_until_s <= now]
        self.counters["reservations_expired"] += len(overdue)
        for request in overdue:
            self.give_up(request, ErrorInfo.of(TransferTimeoutError(f"{request.sender_name} let its lease run out")))
        senders = {request.sender for request in receiving}
        for peer in self._alive.peers:
            if peer not in senders:
                self._alive.forget(peer)
        for peer in self._alive.lost(now):
            self.lost(peer, "no heartbeat")
        for peer in self._alive.peers:
            self._outbox.send(peer, Heartbeat())

    def lost(self, peer: PeerId, reason: str) -> None:
        """A prefill node is lost: fail the requests whose KV or hand-off was to come from it."""
        self._alive.forget(peer)
        lost = [request for request in self._requests.receiving if request.sender == peer]
        if lost:
            self._outbox.do(Log("warning", "prefill node lost", {"peer": peer, "reason": reason}))
        for request in lost:
            self._endings.fail(request, ErrorInfo.of(PeerLostError(f"{peer_name(peer)} is lost: {reason}")))


def _ended(attempt: Attempt, reason: str) -> ReservationEnded:
    return ReservationEnded(request_id=attempt.request_id, epoch=attempt.epoch, reason=reason)
