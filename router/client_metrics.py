"""What clients got and waited for: counted where they are answered, added up where metrics are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from kvrelay.machine.histogram import Histogram
from kvrelay.protocol import histograms
from kvrelay.protocol.messages.base import HistogramReport
from router.openai.choice import Choice


class ClientReport(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What was counted since the last report. ``requests``: API, outcome, count."""

    requests: list[tuple[str, str, int]]
    finished: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    histograms: list[HistogramReport]


class ClientMetrics:
    """Counters and latencies of the clients' requests. ``clock`` returns the time in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._reset()

    def _reset(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        """Choices answered, by API and outcome."""
        self.finished: Counter[str] = Counter()
        """Choices that have ended, by vLLM's reasons."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.ttft = Histogram(histograms.FIRST_TOKEN_BOUNDS_S)
        self.itl = Histogram(histograms.TOKEN_BOUNDS_S)
        self.tpot = Histogram(histograms.TOKEN_BOUNDS_S)
        self.e2e = Histogram(histograms.STAGE_BOUNDS_S)

    def observer(self, api: str, arrival_s: float) -> RequestObserver:
        """Return the observer of an HTTP request that arrived at ``arrival_s``."""
        return RequestObserver(self, api, arrival_s)

    def refused(self, api: str, code: str) -> None:
        """Count an HTTP request answered with an error before any choice was submitted."""
        self.requests[api, code] += 1

    def _histograms(self) -> tuple[Histogram, ...]:
        return self.ttft, self.itl, self.tpot, self.e2e

    def take_report(self) -> ClientReport:
        """Return what was counted since the last report, and begin the next."""
        report = ClientReport(
            [(api, outcome, count) for (api, outcome), count in self.requests.items()],
            dict(self.finished),
            self.prompt_tokens,
            self.cached_tokens,
            self.output_tokens,
            [histogram.report("") for histogram in self._histograms()],
        )
        self._reset()
        return report

    def add(self, report: ClientReport) -> None:
        """Add what another process has counted."""
        for api, outcome, count in report.requests:
            self.requests[api, outcome] += count
        self.finished.update(report.finished)
        self.prompt_tokens += report.prompt_tokens
        self.cached_tokens += report.cached_tokens
        self.output_tokens += report.output_tokens
        for own, its in zip(self._histograms(), report.histograms, strict=True):
            own.add_growth(None, its)


class RequestObserver:
    """Records the latencies of one HTTP request's choices."""

    def __init__(self, metrics: ClientMetrics, api: str, arrival_s: float) -> None:
        self._metrics = metrics
        self._api = api
        self._arrival_s = arrival_s
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}

    def tokens(self, choice: Choice, num_tokens: int) -> None:
        """Record ``num_tokens`` tokens of ``choice`` delivered together."""
        now = self._metrics.clock()
        self._metrics.output_tokens += num_tokens
        if choice.index in self._last_s:
            self._metrics.itl.observe(now - self._last_s[choice.index])
        else:
            self._first_s[choice.index] = now
            self._metrics.ttft.observe(now - self._arrival_s)
            self._metrics.prompt_tokens += choice.num_prompt_tokens
            self._metrics.cached_tokens += choice.num_cached_tokens
        self._last_s[choice.index] = now

    def ended(self, choice: Choice, outcome: str) -> None:
        """Record the end of ``choice``. ``outcome``: ``ok``, ``aborted``, or an error code."""
        metrics = self._metrics
        metrics.requests[self._api, outcome] += 1
        reason = {"ok": str(choice.finish_reason), "aborted": "abort", "request_cancelled": "abort"}.get(
            outcome, "error"
        )
        metrics.finished[reason] += 1
        if outcome != "ok":
            return
        now = metrics.clock()
        metrics.e2e.observe(now - self._arrival_s)
        if not choice.num_tokens and choice.request.sampling.num_prompt_logprobs is not None:
            metrics.prompt_tokens += choice.num_prompt_tokens  # computed, but no token came that tells
        if choice.num_tokens > 1:
            metrics.tpot.observe((now - self._first_s[choice.index]) / (choice.num_tokens - 1))
