"""All expectations of D's messager, from ExpectKV to the message that ends each."""

from __future__ import annotations

from collections.abc import Iterator

from cache_messager.block_mask import all_within
from cache_messager.expectation import Expectation, ExpectationStatus
from cache_messager.work import MessagerOutbox
from kvrelay.errors import KVRelayError, LocalProtocolError
from kvrelay.machine.laws import Laws, Violation
from kvrelay.machine.recent import Recent
from kvrelay.protocol.ids import Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.messager_to_node import KVArrived, KVCancelled, KVEnding, KVExpected, KVFailed
from kvrelay.protocol.messages.node_to_messager import CancelKV, ExpectKV


class Expectations:
    """Expectations by attempt, and the attempts whose KV has recently arrived.

    When no write to an expectation's blocks is in progress any more, its final message is sent to ``node``. The pool
    has ``num_blocks`` blocks in each of ``num_layers`` layers.
    """

    def __init__(self, outbox: MessagerOutbox, node: PeerId, *, num_layers: int, num_blocks: int) -> None:
        self._outbox = outbox
        self._node = node
        self._num_layers = num_layers
        self._num_blocks = num_blocks
        self._expectations: dict[Attempt, Expectation] = {}
        self._arrived: Recent[bool] = Recent()
        self.num_begun = 0
        """Expectations since the start."""

    def __len__(self) -> int:
        return len(self._expectations)

    def __iter__(self) -> Iterator[Expectation]:
        """Iterate over a snapshot: expectations may end during the iteration."""
        return iter(list(self._expectations.values()))

    def __getitem__(self, attempt: Attempt) -> Expectation:
        return self._expectations[attempt]

    def get(self, attempt: Attempt) -> Expectation | None:
        """Return the expectation that has not ended, or None."""
        return self._expectations.get(attempt)

    def has_arrived(self, attempt: Attempt) -> bool:
        """Return whether all KV of ``attempt`` has arrived, if it is one of the attempts remembered."""
        return self._arrived.get(attempt) is not None

    # ------------------------------------------------------------ from the node

    def expect(self, message: ExpectKV) -> None:
        """Accept frames for these blocks from now on."""
        attempt = Attempt(message.request_id, message.epoch)
        if attempt in self._expectations:
            return  # repeated: the answers to the first also answer this one
        self._arrived.forget(attempt)
        self.num_begun += 1
        expectation = self._expectations[attempt] = Expectation(message, self._num_layers, self._outbox.now)
        self._outbox.send(self._node, KVExpected(request_id=message.request_id, epoch=message.epoch))
        if not all_within(message.target_block_ids, self._num_blocks) or not (
            0 <= message.first_block <= self._num_blocks
        ):
            error = LocalProtocolError(f"blocks outside the pool of {self._num_blocks} are expected")
            self.fail(expectation, error)
            return
        self.finish(expectation)

    def cancel(self, message: CancelKV) -> None:
        """Start no further writes to the blocks; send KVCancelled when none is in progress."""
        attempt = Attempt(message.request_id, message.epoch)
        cancelled = KVCancelled(request_id=message.request_id, epoch=message.epoch)
        self._arrived.forget(attempt)
        expectation = self._expectations.get(attempt)
        if expectation is None:
            self._outbox.send(self._node, cancelled)
        else:
            self._leave(expectation, cancelled)

    # ------------------------------------------------------------ endings

    def fail(self, expectation: Expectation, error: KVRelayError) -> None:
        """Start no further writes, and end ``expectation`` with ``error``."""
        request_id, epoch = expectation.attempt
        self._leave(expectation, KVFailed(request_id=request_id, epoch=epoch, error=ErrorInfo.of(error)))

    def _leave(self, expectation: Expectation, final_message: KVEnding) -> None:
        """Start no further writes, and send ``final_message`` when none is in progress."""
        expectation.final_message = final_message
        if expectation.status is ExpectationStatus.RECEIVING:
            expectation.lifecycle.move(ExpectationStatus.DRAINING, self._outbox.now)
        self.finish(expectation)

    def finish(self, expectation: Expectation) -> None:
        """End ``expectation`` if all is written, or if it is draining and nothing is being written."""
        if expectation.num_writing or expectation.status is ExpectationStatus.ENDED:
            return
        request_id, epoch = expectation.attempt
        if expectation.status is ExpectationStatus.RECEIVING:
            if not expectation.is_written:
                return
            expectation.final_message = KVArrived(request_id=request_id, epoch=epoch, num_bytes=expectation.num_bytes)
            self._arrived.note(expectation.attempt, True)
        expectation.lifecycle.move(ExpectationStatus.ENDED, self._outbox.now)
        del self._expectations[expectation.attempt]
        if expectation.final_message is not None:
            self._outbox.send(self._node, expectation.final_message)

    def laws_at_rest(self) -> Laws:
        """Check that no expectation is held; see ``kvrelay.machine.laws``."""
        if self._expectations:
            histories = {attempt: expectation.lifecycle.history for attempt, expectation in self._expectations.items()}
            yield [Violation(f"receiver not quiescent: {histories}")]
