"""All transfers of P's messager, from the first signal to the message that ends each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cache_messager.counters import Counters
from cache_messager.pending import PendingCount, PendingSignal
from cache_messager.sender_link import SenderLink
from cache_messager.transfer import Transfer, TransferStatus
from cache_messager.work import MessagerOutbox
from kvrelay.errors import KVRelayError, TransferError
from kvrelay.machine.laws import Laws, Violation
from kvrelay.machine.recent import Recent
from kvrelay.protocol.ids import Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.messager_to_node import TransferClosed, TransferDone, TransferEnding, TransferFailed


class Transfers:
    """Transfers by attempt, and the endings of recent ones. ``links``: the shared links, by D's messager.

    A transfer that fails or is closed sends nothing more; ``node`` gets its final messages when nothing reads its
    blocks any more. If it fails and is closed, both are sent, the failure first, because a corrupt block also affects
    the requests that share it.
    """

    def __init__(
        self, links: Mapping[PeerId, SenderLink], outbox: MessagerOutbox, counters: Counters, node: PeerId
    ) -> None:
        self._links = links
        self._outbox = outbox
        self._counters = counters
        self._node = node
        self._transfers: dict[Attempt, Transfer] = {}
        self._endings: Recent[type[TransferEnding]] = Recent()
        self._pending = PendingCount()
        self.num_begun = 0
        """Transfers since the start."""

    def __len__(self) -> int:
        return len(self._transfers)

    def __iter__(self) -> Iterator[Transfer]:
        """Iterate over a snapshot: transfers may end during the iteration."""
        return iter(list(self._transfers.values()))

    def __getitem__(self, attempt: Attempt) -> Transfer:
        return self._transfers[attempt]

    def get(self, attempt: Attempt) -> Transfer | None:
        """Return the transfer that has not ended, or None."""
        return self._transfers.get(attempt)

    def ending(self, attempt: Attempt) -> type[TransferEnding] | None:
        """Return the type of the message that ended the last transfer of ``attempt``, or None."""
        return self._endings.get(attempt)

    def get_or_begin(self, attempt: Attempt, num_layers: int) -> Transfer:
        """Return the transfer of ``attempt``, created if there is none."""
        if attempt not in self._transfers:
            self._transfers[attempt] = Transfer(attempt, num_layers, self._outbox.now)
            self.num_begun += 1
        return self._transfers[attempt]

    # ------------------------------------------------------------ signals before the transfer is opened

    def keep(self, transfer: Transfer, signal: PendingSignal) -> None:
        """Keep ``signal`` until ``transfer`` is opened; fail the transfer if there is no room."""
        if not self._pending.has_room(signal):
            self.fail(transfer, TransferError("too many blocks signalled that no decode node has taken yet"))
            return
        transfer.pending.append(signal)
        self._pending.add(signal)
        self._counters["pending_signals_total"] += 1

    def drop_pending(self, transfer: Transfer) -> None:
        """Remove the signals of ``transfer`` from the count when it is opened or ends."""
        self._pending.remove(transfer.pending)

    @property
    def num_pending_signals(self) -> int:
        """Pending signals of all transfers."""
        return self._pending.num_signals

    # ------------------------------------------------------------ endings

    def fail(self, transfer: Transfer, error: KVRelayError) -> None:
        """Stop sending ``transfer``, and end it with ``error``."""
        self.leave(transfer, failed(transfer.attempt, error))

    def leave(self, transfer: Transfer, final_message: TransferEnding) -> None:
        """Stop sending ``transfer``; send ``final_message`` when nothing reads its blocks any more."""
        if isinstance(final_message, TransferFailed):
            transfer.failure = transfer.failure or final_message
        else:
            transfer.closed = final_message
        if transfer.status is TransferStatus.PENDING:
            self.drop_pending(transfer)
            self._end(transfer, *transfer.final_messages)
            return
        if transfer.status is TransferStatus.SENDING:
            link = self._links.get(transfer.peer)
            if link is not None:
                link.drop(transfer)
            transfer.lifecycle.move(TransferStatus.DRAINING, self._outbox.now)
        self.finish(transfer)

    def finish(self, transfer: Transfer) -> None:
        """End ``transfer`` if all is written, or if it is draining and nothing reads its blocks any more."""
        if transfer.inflight or transfer.reading:
            return
        if transfer.status is TransferStatus.SENDING and transfer.is_written:
            self._end(transfer, _done(transfer, self._links[transfer.peer].kind))
        elif transfer.status is TransferStatus.DRAINING:
            self._end(transfer, *transfer.final_messages)

    def _end(self, transfer: Transfer, *final_messages: TransferEnding) -> None:
        transfer.lifecycle.move(TransferStatus.ENDED, self._outbox.now)
        del self._transfers[transfer.attempt]
        link = self._links.get(transfer.peer)
        if link is not None:
            link.transfers.pop(transfer, None)
        for final_message in final_messages:
            self.answer(transfer.attempt, final_message)

    def answer(self, attempt: Attempt, final_message: TransferEnding) -> None:
        """Send ``final_message`` to the node and remember the ending, because late signals may still arrive."""
        self._counters["transfers_done"] += isinstance(final_message, TransferDone)
        self._counters["transfers_failed"] += isinstance(final_message, TransferFailed)
        self._endings.note(attempt, type(final_message))
        self._outbox.send(self._node, final_message)

    def laws_at_rest(self) -> Laws:
        """Check that no transfer or signal is held; see ``kvrelay.machine.laws``."""
        if self._transfers or self._pending.num_signals or self._pending.num_blocks:
            histories = {attempt: transfer.lifecycle.history for attempt, transfer in self._transfers.items()}
            text = f"sender not quiescent: {histories}, {self._pending.num_signals} pending signals"
            yield [Violation(text)]


def closed(attempt: Attempt) -> TransferClosed:
    """Return the message that ends a transfer closed by its node."""
    return TransferClosed(request_id=attempt.request_id, epoch=attempt.epoch)


def failed(attempt: Attempt, error: KVRelayError) -> TransferFailed:
    """Return the message that ends a transfer with ``error``."""
    return TransferFailed(request_id=attempt.request_id, epoch=attempt.epoch, error=ErrorInfo.of(error))


def _done(transfer: Transfer, link_kind: str) -> TransferDone:
    return TransferDone(
        request_id=transfer.attempt.request_id,
        epoch=transfer.attempt.epoch,
        num_bytes=transfer.num_bytes,
        link=link_kind,
        layers=transfer.timeline(),
    )
