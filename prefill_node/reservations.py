"""P's reservations on decode nodes: asking for blocks, hand-offs, leases, and decode nodes that are lost."""

from __future__ import annotations

from typing import TypeAlias, assert_never

import msgspec

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.errors import NeverFitsError, PeerLostError, TransferError
from kvrelay.machine.contract import CancelTimer, Connect, Disconnect, Log, SetTimer
from kvrelay.machine.liveness import Liveness
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import MESSAGER, Attempt, PeerId, peer_name
from kvrelay.protocol.messages.base import ErrorInfo, NodeAddress
from kvrelay.protocol.messages.decode_to_prefill import BlocksReserved, ReservationEnded, ReservationRefused
from kvrelay.protocol.messages.node_to_messager import OpenTransfer
from kvrelay.protocol.messages.node_to_router import DecodeNeeded
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation, HandOff, RenewReservations, ReserveBlocks
from kvstore.blocks.kv_cache import KVCache
from prefill_node.endings import PrefillEndings
from prefill_node.request import PrefillRequest, PrefillStatus, Reservation
from prefill_node.requests import Requests

Answer: TypeAlias = BlocksReserved | ReservationRefused | ReservationEnded


class Reservations:
    """Asks all decode nodes, and takes their answers.

    A request's timer, keyed by its attempt, is the deadline of the answer it waits for: D's to a reservation, or the
    router's for another decode node. The machine calls ``overdue`` then, and ``renew`` at each heartbeat.
    """

    def __init__(
        self, node: NodeConfig, kv: KVCache, requests: Requests, endings: PrefillEndings, outbox: Outbox
    ) -> None:
        self._kv = kv
        self._requests = requests
        self._endings = endings
        self._outbox = outbox
        self._timeout_s = node.transfer.timeout_s
        self._alive = Liveness(node.cluster.peer_timeout_s)
        self._connected: set[PeerId] = set()

    def record_message(self, peer: PeerId) -> None:
        """Note that a message of ``peer`` arrived."""
        self._alive.record_message(peer, self._outbox.now)

    def resumed(self, paused_s: float) -> None:
        """This process did not run for ``paused_s``: no decode node is to blame for its silence."""
        self._alive.resumed(paused_s, self._outbox.now)

    # ------------------------------------------------------------ asking

    def ask(self, request: PrefillRequest) -> None:
        """Ask the decode node of ``request`` for blocks."""
        decode_node, spec = request.target, request.spec
        self._connect(decode_node)
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

    def _connect(self, decode_node: NodeAddress) -> None:
        """Connect to ``decode_node`` unless that is done already.

        An earlier process of its name is lost. The connection to that one must be closed too: the new one may listen at
        the same address, and would take both connections for one.
        """
        if decode_node.peer in self._connected:
            return
        for peer in [peer for peer in self._connected if peer_name(peer) == peer_name(decode_node.peer)]:
            self.lost(peer, "it was started again")
        self._connected.add(decode_node.peer)
        self._outbox.do(Connect(decode_node.peer, decode_node.address))

    def _set_deadline(self, request: PrefillRequest) -> None:
        self._outbox.do(SetTimer(request.attempt, self._outbox.now + self._timeout_s))

    def overdue(self, request: PrefillRequest) -> None:
        """Look for another decode node: the answer that ``request`` waits for has not come in time."""
        if request.reservation is Reservation.ASKED:
            self._endings.cancel_reservation(request, "no answer in time")
            self._refused(request, "no answer in time", 0.0)
        elif request.reservation is Reservation.REFUSED and request.decode_needed is not None:
            self._need_decode(request, request.decode_needed)

    # ------------------------------------------------------------ answers

    def take_answer(self, peer: PeerId, request: PrefillRequest | None, answer: Answer) -> None:
        """Take the answer of ``peer`` to a reservation. It may be late: another node may have been chosen meanwhile."""
        if request is None or not request.holds_with(peer):
            if isinstance(answer, BlocksReserved):
                cancel = CancelReservation(
                    request_id=answer.request_id, epoch=answer.epoch, reason="not wanted any more"
                )
                self._outbox.send(peer, cancel)
            return
        match answer:
            case BlocksReserved():
                if request.reservation is Reservation.ASKED:
                    self._reserved(request, answer)
            case ReservationRefused(reason=reason, retry_after_s=retry_after_s):
                if request.reservation is Reservation.ASKED:
                    self._refused(request, reason, retry_after_s)
            case ReservationEnded(reason=reason):
                request.reservation = Reservation.NONE
                self._endings.fail(
                    request, ErrorInfo.of(TransferError(f"the decode node ended the reservation: {reason}"))
                )
            case _:
                assert_never(answer)

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
            self._endings.fail(request, ErrorInfo.of(NeverFitsError(reason)))
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
        """Ask the router for a decode node, and again after a while: it may have none, or the message may be lost."""
        self._outbox.send(request.spec.router, needed)
        self._set_deadline(request)

    def hand_off(self, request: PrefillRequest) -> None:
        """Give ``request`` to D if D has granted its blocks; otherwise ``take_answer`` does it when it has."""
        if request.reservation is not Reservation.GRANTED:
            return
        spec = msgspec.structs.replace(request.spec, output_token_ids=request.token_ids[request.num_prompt_tokens :])
        request.mark("hand_off", self._outbox.now)
        hand_off = HandOff(
            request=spec,
            num_cached_tokens=request.num_cached_tokens,
            may_be_shared=self._kv.may_be_published(request.block_table),
        )
        self._outbox.send(request.target.peer, hand_off)

    # ------------------------------------------------------------ leases and lost decode nodes

    def renew(self) -> None:
        """Renew the lease of every reservation held; give silent decode nodes up as lost."""
        held: dict[PeerId, list[Attempt]] = {}
        for request in self._requests:
            if not request.is_over and request.reservation in (Reservation.ASKED, Reservation.GRANTED):
                held.setdefault(request.target.peer, []).append(request.attempt)
        for peer in self._alive.peers:
            if peer not in held:
                self._alive.forget(peer)
        for peer, attempts in held.items():
            self._outbox.send(peer, RenewReservations(attempts=attempts))
        for peer in self._alive.lost(self._outbox.now):
            self.lost(peer, "no heartbeat")

    def lost(self, peer: PeerId, reason: str) -> None:
        """A decode node is lost: look for another for requests it has not answered, fail those it has granted."""
        self._alive.forget(peer)
        if peer not in self._connected:
            return
        self._connected.discard(peer)
        self._outbox.do(Log("warning", "decode node lost", {"peer": peer, "reason": reason}))
        for request in list(self._requests):
            if request.is_over or request.decode_node is None or request.target.peer != peer:
                continue
            if request.reservation is Reservation.ASKED:
                self._refused(request, f"{peer_name(peer)} is lost: {reason}", 0.0)
            elif request.reservation is Reservation.GRANTED:
                request.reservation = Reservation.NONE
                self._endings.fail(request, ErrorInfo.of(PeerLostError(f"{peer_name(peer)} is lost: {reason}")))
        self._outbox.do(Disconnect(peer))
