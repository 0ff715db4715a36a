"""What P has to do with decode nodes: asking for blocks, handing requests over, noticing that one is gone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

import msgspec

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import NeverFitsError, PeerLostError, TransferError
from kvrelay.machine.contract import CancelTimer, Connect, Disconnect, Log, SetTimer
from kvrelay.machine.liveness import Liveness
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import MESSAGER, PeerId, peer_name
from kvrelay.protocol.messages.base import ErrorInfo, NodeAddress
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.node_to_messager import OpenTransfer
from kvrelay.protocol.messages.node_to_router import DecodeNeeded
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, RenewReservations, ReserveBlocks
from prefill_node.request import PrefillRequest, PrefillStatus, Reservation

Answer: TypeAlias = BlocksReserved | ReservationRefused | ReservationEnded


class Reservations:
    """One for all decode nodes. ``fail`` ends a request with an error.

    A request's timer, keyed by its attempt, is the deadline of whatever answer it waits for: D's to a reservation, or
    the router's for another decode node.
    """

    def __init__(self, node: NodeConfig, outbox: Outbox, fail: Callable[[PrefillRequest, ErrorInfo], None]) -> None:
        self._outbox = outbox
        self._fail = fail
        self._timeout_s = node.transfer.timeout_s
        self._alive = Liveness(node.cluster.peer_timeout_s)
        self._connected: set[PeerId] = set()

    def heard(self, peer: PeerId) -> None:
        """Note a sign of life."""
        self._alive.heard(peer, self._outbox.now)

    # ------------------------------------------------------------ asking

    def ask(self, request: PrefillRequest, requests: Collection[PrefillRequest]) -> None:
        """Ask the decode node of ``request`` for blocks; ``requests`` are all there are."""
        decode_node, spec = request.target, request.spec
        self._connect(decode_node, requests)
        self._alive.watch(decode_node.peer, self._outbox.now)
        request.reservation = Reservation.ASKED
        reserve = ReserveBlocks(
            request_id=spec.request_id,
            epoch=spec.epoch,
            block_hashes=request.hashes,
            num_tokens=request.num_kv_tokens,
            max_tokens=spec.sampling.max_tokens - len(spec.output_token_ids),
            priority=spec.priority,
            router=spec.router,
        )
        self._outbox.send(decode_node.peer, reserve)
        self._set_deadline(request)

    def _connect(self, decode_node: NodeAddress, requests: Collection[PrefillRequest]) -> None:
        """Reach out to ``decode_node`` unless that is done already.

        Whoever had its name before is gone. The connection to it must go too: the new one may listen at the same
        address and would take both for one.
        """
        if decode_node.peer in self._connected:
            return
        for peer in [peer for peer in self._connected if peer_name(peer) == peer_name(decode_node.peer)]:
            self.lost(peer, "it was started again", requests)
        self._connected.add(decode_node.peer)
        self._outbox.do(Connect(decode_node.peer, decode_node.address))

    def _set_deadline(self, request: PrefillRequest) -> None:
        self._outbox.do(SetTimer(request.attempt, self._outbox.now + self._timeout_s))

    def overdue(self, request: PrefillRequest) -> None:
        """The answer that ``request`` waits for has not come in time."""
        if request.reservation is Reservation.ASKED:
            self.cancel(request, "no answer in time")
            self._refused(request, "no answer in time", 0.0)
        elif request.reservation is Reservation.REFUSED and request.decode_needed is not None:
            self._need_decode(request, request.decode_needed)

    def cancel(self, request: PrefillRequest, reason: str) -> None:
        """Let go of whatever ``request`` has, or asked for, on its decode node."""
        if request.reservation is not Reservation.NONE:
            self._outbox.do(CancelTimer(request.attempt))
        if request.reservation in (Reservation.ASKED, Reservation.GRANTED):
            self._outbox.send(request.target.peer, _cancellation(request.spec.request_id, request.spec.epoch, reason))
        request.reservation = Reservation.NONE

    # ------------------------------------------------------------ answers

    def take_answer(self, peer: PeerId, request: PrefillRequest | None, answer: Answer) -> None:
        """Take what ``peer`` says about a reservation. It may be late: asked meanwhile, or chosen, is another node."""
        if request is None or not request.holds_with(peer):
            if isinstance(answer, BlocksReserved):
                self._outbox.send(peer, _cancellation(answer.request_id, answer.epoch, "not wanted any more"))
            return
        match answer:
            case BlocksReserved() if request.reservation is Reservation.ASKED:
                self._reserved(request, answer)
            case ReservationRefused(reason=reason, retry_after_s=retry_s) if request.reservation is Reservation.ASKED:
                self._refused(request, reason, retry_s)
            case ReservationEnded(reason=reason):
                request.reservation = Reservation.NONE
                self._fail(request, ErrorInfo.of(TransferError(f"the decode node ended the reservation: {reason}")))

    def _reserved(self, request: PrefillRequest, answer: BlocksReserved) -> None:
        request.reservation = Reservation.GRANTED
        request.mark("reserved", self._outbox.now)
        open_transfer = OpenTransfer(
            request_id=answer.request_id,
            epoch=answer.epoch,
            link=answer.link,
            first_block=answer.num_cached_blocks,
            target_block_ids=answer.block_ids,
        )
        self._outbox.do(CancelTimer(request.attempt))
        self._outbox.send(MESSAGER, open_transfer)
        if request.status is PrefillStatus.SENDING:
            self.hand_off(request)

    def _refused(self, request: PrefillRequest, reason: str, retry_after_s: float | None) -> None:
        request.reservation = Reservation.REFUSED
        if retry_after_s is None:
            self._fail(request, ErrorInfo.of(NeverFitsError(reason)))
            return
        request.decode_needed = DecodeNeeded(
            request_id=request.spec.request_id,
            epoch=request.spec.epoch,
            refused_by=request.target.peer,
            reason=reason,
            retry_after_s=retry_after_s,
        )
        self._need_decode(request, request.decode_needed)

    def _need_decode(self, request: PrefillRequest, needed: DecodeNeeded) -> None:
        """Ask the router for a decode node, and again after a while: it may have none, or nothing of it got through."""
        self._outbox.send(request.spec.router, needed)
        self._set_deadline(request)

    def hand_off(self, request: PrefillRequest) -> None:
        """Give ``request`` to D, if D has granted its blocks; if not yet, that follows when it does."""
        if request.reservation is not Reservation.GRANTED:
            return
        sequence = request.sequence
        spec = msgspec.structs.replace(request.spec, output_token_ids=sequence.token_ids[sequence.num_prompt_tokens :])
        request.mark("hand_off", self._outbox.now)
        self._outbox.send(request.target.peer, HandOff(request=spec, num_cached_tokens=request.num_cached_tokens))

    # ------------------------------------------------------------ decode nodes that live, and do not

    def renew(self, requests: Collection[PrefillRequest]) -> None:
        """Renew the lease of every reservation held; find out who has gone silent."""
        held: dict[PeerId, list[tuple[str, int]]] = {}
        for request in requests:
            if not request.is_over and request.reservation in (Reservation.ASKED, Reservation.GRANTED):
                held.setdefault(request.target.peer, []).append((request.spec.request_id, request.spec.epoch))
        for peer in self._alive.peers:
            if peer not in held:
                self._alive.forget(peer)
        for peer, attempts in held.items():
            self._outbox.send(peer, RenewReservations(attempts=attempts))
        for peer in self._alive.lost(self._outbox.now):
            self.lost(peer, "no sign of life", requests)

    def lost(self, peer: PeerId, reason: str, requests: Collection[PrefillRequest]) -> None:
        """A decode node is gone: what it was only asked for goes elsewhere, what it had granted fails."""
        self._alive.forget(peer)
        if peer not in self._connected:
            return
        self._connected.discard(peer)
        self._outbox.do(Log("warning", "decode node lost", {"peer": peer, "reason": reason}))
        for request in list(requests):
            if request.is_over or request.decode_node is None or request.target.peer != peer:
                continue
            if request.reservation is Reservation.ASKED:
                self._refused(request, f"{peer} is lost: {reason}", 0.0)
            elif request.reservation is Reservation.GRANTED:
                request.reservation = Reservation.NONE
                self._fail(request, ErrorInfo.of(PeerLostError(f"{peer} is lost: {reason}")))
        self._outbox.do(Disconnect(peer))


def _cancellation(request_id: str, epoch: int, reason: str) -> CancelReservation:
    return CancelReservation(request_id=request_id, epoch=epoch, reason=reason)
