"""What a role adds to the machine that all nodes have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Any, Generic, TypeVar

from kvrelay.machine.contract import KVLoaded, KVStaged, KVStored, LayersComputed, StepDone, StepFailed, StoreCounted
from kvrelay.node.endings import Endings
from kvrelay.node.request import NodeRequest
from kvrelay.node.request_table import RequestTable
from kvrelay.protocol.ids import Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Load, Message
from kvrelay.protocol.messages.messager_to_node import MessagerReady
from kvstore.offload.store_transfers import StoreTransfers

R = TypeVar("R", bound=NodeRequest[Any])
S = TypeVar("S", bound=StrEnum)


class RoleContract(ABC, Generic[R, S]):
    """A role builds its parts in its constructor, among them these three, and implements the abstract methods."""

    requests: RequestTable[R, S]
    _endings: Endings[R, S]
    _transfers: StoreTransfers[Any, Any]

    @abstractmethod
    def load(self) -> Load:
        """Describe how busy the node is, for heartbeats."""

    @abstractmethod
    def _start_steps(self) -> None:
        """Plan what can be computed now. Called after every event."""

    @abstractmethod
    def _step_ended(self, event: StepDone | StepFailed) -> None:
        """Take the result of the oldest plan in flight."""

    @abstractmethod
    def _layers_computed(self, event: LayersComputed) -> None:
        """Take the news that layers of a step are computed. They come only if ``run_node`` is told so."""

    @abstractmethod
    def _store_answered(self, event: KVStaged | KVStored | StoreCounted) -> None:
        """Take an answer of the store that is about a save, or its counters."""

    @abstractmethod
    def _kv_loaded(self, event: KVLoaded) -> None:
        """Take the answer to a read."""

    @abstractmethod
    def _take(self, peer: PeerId, message: Message) -> None:
        """Take a message that is not common to all nodes; ``peer`` may send it."""

    @abstractmethod
    def _record_message(self, peer: PeerId) -> None:
        """Note that a message of ``peer`` arrived, if it is another node."""

    @abstractmethod
    def _beat_to_nodes(self) -> None:
        """Renew what is held on nodes of the other role; find out which of them are silent."""

    @abstractmethod
    def _resumed(self, paused_s: float) -> None:
        """Blame no other node for the last ``paused_s``, in which this process did not run."""

    @abstractmethod
    def _node_lost(self, peer: PeerId, reason: str) -> None:
        """End what depends on another node that is lost."""

    @abstractmethod
    def _fail(self, request: R, error: ErrorInfo) -> None:
        """End ``request`` with ``error``, for the router and for the other node that has to do with it."""

    def _deadline_over(self, attempt: Attempt) -> None:
        """Take the timer of a request, if the role sets any."""

    def _messager_ready(self, message: MessagerReady) -> None:
        """Note where the messager can be reached, if the role wants to know."""
