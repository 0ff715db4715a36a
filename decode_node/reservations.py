"""What D has to do with prefill nodes: reservations, the KV that arrives for them, hand-offs, leases."""

from __future__ import annotations

from typing import NamedTuple

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from decode_node.schedule import Scheduler
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
from kvrelay.protocol.ids import MESSAGER, Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, LinkAddress
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.node_to_messager import ExpectKV
from kvrelay.protocol.messages.prefill_to_decode import HandOff, ReserveBlocks

RETRY_AFTER_S = 0.1
"""When P may ask again after a refusal for want of room: a few decode steps."""


class Refusal(NamedTuple):
    """Why a reservation is not granted, and when to ask again; None: never."""

    reason: str
    retry_after_s: float | None


class Reservations:
    """One for all prefill nodes. Requests that are reserved or receiving are its own; then they are the scheduler's.

    ``link`` is where the messager takes frames, once it is up.
    """

    def __init__(self, node: NodeConfig, scheduler: Scheduler, requests: Requests, outbox: Outbox) -> None:
        self._scheduler = scheduler
        self._requests = requests
        self._outbox = outbox
        self._lease_s = node.transfer.lease_s
        self._block_size = node.cache.block_size
        self._alive = Liveness(node.cluster.peer_timeout_s)
        self.link: LinkAddress | None = None
        self.counters = {"reservations_refused": 0.0, "kv_bytes_received": 0.0}

    def heard(self, peer: PeerId) -> None:
        """Note a sign of life."""
        self._alive.heard(peer, self._outbox.now)

    # ------------------------------------------------------------ reserving

    def reserve(self, peer: PeerId, message: ReserveBlocks, inadmissible: ErrorInfo | None) -> None:
        """Set blocks aside for ``peer``, or refuse; ``inadmissible`` says why the node would refuse anybody."""
        attempt = Attempt(message.request_id, message.epoch)
        known = self._requests.find(attempt)
        if known is not None and known.sender == peer and known.is_reserved:
            self._say_again(known)
            return
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
        reason = self._scheduler.may_reserve(message.priority, message.num_tokens, self._outbox.now)
        return None if reason is None else Refusal(reason, RETRY_AFTER_S)

    def _try_reserve(self, peer: PeerId, message: ReserveBlocks) -> Refusal | None:
        """Give the reservation its blocks and have the messager expect KV in them, if there is room."""
        request = DecodeRequest.reserved(message, peer, self._outbox.now)
        kv = self._scheduler.kv
        matched = kv.match(message.block_hashes)
        num_new = -(-message.num_tokens // self._block_size) - len(matched)
        if not self._scheduler.fits(request, num_new, matched):
            return Refusal(f"{num_new} KV blocks are not free beside what running requests need", RETRY_AFTER_S)
        kv.pin(matched)
        request.take_blocks([*matched, *kv.allocate(num_new)])
        request.num_cached_blocks = len(matched)
        kv.record_query(message.num_tokens, len(matched) * self._block_size)
        request.lease_until_s = self._outbox.now + self._lease_s
        request.messager_holds = True
        self._requests.add(request)
        self._scheduler.receiving[request] = None
        self._scheduler.order.passed(message.priority, message.num_tokens)
        self._alive.watch(peer, self._outbox.now)
        expect = ExpectKV(
            request_id=message.request_id,
            epoch=message.epoch,
            first_block=len(matched),
            target_block_ids=request.block_table[len(matched) :].tolist(),
        )
        self._outbox.send(MESSAGER, expect)
        return None

    def expected(self, request: DecodeRequest) -> None:
        """The messager takes frames for the blocks now: only now may P know of them."""
        request.lifecycle.move(DecodeStatus.RECEIVING, self._outbox.now)
        request.mark("reserved", self._outbox.now)
        self._send_reserved(request)
        self._begin_if_ready(request)

    def _say_again(self, request: DecodeRequest) -> None:
        """P asked twice for one reservation. Before its messager's answer nothing need be said: that answers both."""
        if request.status is DecodeStatus.RECEIVING:
            self._send_reserved(request)

    def _send_reserved(self, request: DecodeRequest) -> None:
        if self.link is None or request.sender is None:
            raise LocalProtocolError("a reservation without messager or sender", request_id=request.spec.request_id)
        reserved = BlocksReserved(
            request_id=request.spec.request_id,
            epoch=request.spec.epoch,
            block_ids=request.block_table[request.num_cached_blocks :].tolist(),
            num_cached_blocks=request.num_cached_blocks,
            link=self.link,
            lease_s=self._lease_s,
        )
        self._outbox.send(request.sender, reserved)

    # ------------------------------------------------------------ taking over

    def arrived(self, request: DecodeRequest, num_bytes: int) -> None:
        """All KV is here and verified."""
        request.kv_arrived, request.messager_holds = True, False
        request.mark("kv_arrived", self._outbox.now)
        self.counters["kv_bytes_received"] += num_bytes
        self._begin_if_ready(request)

    def kv_failed(self, request: DecodeRequest, error: ErrorInfo) -> None:
        """The transfer is over without success."""
        request.messager_holds = False
        if request.is_over:
            self._requests.end_if_unused(request)
        else:
            self._give_up(request, error)

    def hand_off(self, peer: PeerId, message: HandOff, wrong: KVRelayError | None) -> None:
        """Own the request from here on, or tell both P and the router why not; ``wrong``: what is wrong with it."""
        spec = message.request
        request = self._requests.find(spec.attempt)
        if request is not None and request.sender != peer:
            self._outbox.send(peer, _ended(spec.attempt, "the reservation is another's"))
        elif request is None or request.is_over:
            self._outbox.send(peer, _ended(spec.attempt, "no such reservation"))
            self._requests.report(spec, ErrorInfo.of(TransferError("handed off without a reservation")))
        elif wrong is not None:
            self._give_up(request, ErrorInfo.of(wrong))
        elif not request.accepts(spec):
            self._give_up(request, ErrorInfo.of(TransferError("handed off with another length than reserved")))
        elif not request.handed_off:
            request.hand_off(message)
            request.mark("handed_off", self._outbox.now)
            self._begin_if_ready(request)

    def _begin_if_ready(self, request: DecodeRequest) -> None:
        """Let ``request`` decode, and others share its blocks, once it has both its KV and its hand-off.

        KV may arrive whole and as it was sent from a prompt that fails on P in the step that computed it: the hand-off
        is P's word that it is good.
        """
        if request.status is DecodeStatus.RECEIVING and request.kv_arrived and request.handed_off:
            self._scheduler.publish_blocks(request, len(request.hashes))
            del self._scheduler.receiving[request]
            request.begin_decode(self._outbox.now)
            self._scheduler.decoding[request] = None

    # ------------------------------------------------------------ giving up

    def give_up_all(self, requests: list[DecodeRequest], error: KVRelayError) -> None:
        """End ``requests`` with ``error``, and say so to the prefill nodes they came from."""
        for request in requests:
            self._give_up(request, ErrorInfo.of(error))

    def _give_up(self, request: DecodeRequest, error: ErrorInfo) -> None:
        if request.sender is not None:
            self._outbox.send(request.sender, _ended(request.attempt, error.message))
        self._requests.fail(request, error)

    def renew(self, peer: PeerId, attempts: list[tuple[str, int]]) -> None:
        """Renew the leases that ``peer`` names; tell it of those that are no more."""
        for request_id, epoch in attempts:
            attempt = Attempt(request_id, epoch)
            request = self._requests.find(attempt)
            if request is None:
                self._outbox.send(peer, _ended(attempt, "no such reservation"))
            elif request.sender == peer:
                request.lease_until_s = self._outbox.now + self._lease_s

    def heartbeat(self) -> None:
        """End what has outlived its lease, find out who has gone silent, and be heard by the others."""
        now, receiving = self._outbox.now, self._scheduler.receiving
        overdue = [request for request in receiving if request.lease_until_s <= now]
        for request in overdue:
            self.give_up_all([request], TransferTimeoutError(f"{request.sender} let its lease run out"))
        senders = {request.sender for request in receiving}
        for peer in self._alive.peers:
            if peer not in senders:
                self._alive.forget(peer)
        for peer in self._alive.lost(now):
            self.lost(peer, "no sign of life")
        for peer in self._alive.peers:
            self._outbox.send(peer, Heartbeat())

    def lost(self, peer: PeerId, reason: str) -> None:
        """A prefill node is gone, and with it what was still to come from it."""
        self._alive.forget(peer)
        lost = [request for request in self._scheduler.receiving if request.sender == peer]
        if lost:
            self._outbox.do(Log("warning", "prefill node lost", {"peer": peer, "reason": reason}))
        for request in lost:
            self._requests.fail(request, ErrorInfo.of(PeerLostError(f"{peer} is lost: {reason}")))


def _ended(attempt: Attempt, reason: str) -> ReservationEnded:
    return ReservationEnded(request_id=attempt.request_id, epoch=attempt.epoch, reason=reason)
