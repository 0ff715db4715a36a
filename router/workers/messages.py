"""Messages between the router and its workers, besides the machine's events and deliveries (``router/events.py``)."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.protocol.ids import RequestId
from router.client_metrics import ClientReport
from router.events import ClientGone, Deliver, NewRequest, StopMatched


class Start(msgspec.Struct, frozen=True):
    """The first thing a worker reads, on its standard input. ``config``: JSON of the sections it needs.

    ``started_s``: when the router started. ``max_model_len``: see ``MaxModelLen``.
    """

    index: int
    config: msgspec.Raw
    started_s: float
    max_model_len: int


# ---------------------------------------------------------------- router -> worker


class Serve(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Router -> worker, once: accept connections."""


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Router -> worker: accept nothing more, finish, report and end. The second time: do not wait for clients."""


class MaxModelLen(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Router -> worker, when it has changed: the longest sequence that the cluster serves, in tokens."""

    num_tokens: int


class ReportWanted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Router -> worker, before metrics are read: answer ``Reported``."""

    ask_id: int


class Answered(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Router -> worker: the answer to an ``Asked``."""

    ask_id: int
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class InProgress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Router -> worker: the answer to an ``InProgressAsked``."""

    ask_id: int
    is_any: bool


class UseBegun(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Router -> worker: the answer to a ``UseWanted``. The use has begun if ``wait_s`` is 0."""

    ask_id: int
    wait_s: float
    headers: list[tuple[bytes, bytes]]


Reply: TypeAlias = Answered | InProgress | UseBegun
ToWorker: TypeAlias = Deliver | Serve | Stop | MaxModelLen | ReportWanted | Reply


# ---------------------------------------------------------------- worker -> router


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker -> router, once: it can serve."""


class Submission(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker -> router: requests to admit all together or not at all. ``more``: another message has the rest.

    Parts are small, because to decode many long prompts at once would hold up the router's loop.
    """

    requests: list[NewRequest]
    more: bool = False


class Asked(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker -> router: what is the answer to ``GET path?query``? Answer ``Answered``."""

    ask_id: int
    path: str
    query: bytes


class InProgressAsked(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker -> router: does a request in progress have one of these ids? Answer ``InProgress``."""

    ask_id: int
    request_ids: list[RequestId]


class UseWanted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker -> router: may a request with this API key, which has these limits, begin? Answer ``UseBegun``."""

    ask_id: int
    key: str
    max_requests: int | None
    tokens_per_minute: int | None


class UseCharged(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker -> router: the answer to the request with this ``UseWanted`` had so many tokens."""

    ask_id: int
    num_tokens: int


class UseEnded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker -> router: the request with this ``UseWanted`` has ended, if it has begun."""

    ask_id: int


class Reported(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker -> router, now and then (``ask_id`` 0), when asked, and at its end: what it has counted since the last."""

    ask_id: int
    report: ClientReport


FromWorker: TypeAlias = (
    Ready
    | Submission
    | ClientGone
    | StopMatched
    | Asked
    | InProgressAsked
    | UseWanted
    | UseCharged
    | UseEnded
    | Reported
)
WorkerMessage: TypeAlias = ToWorker | FromWorker
