"""How long the stages of requests took on this node, and where their prompt tokens came from.

Each request is looked at once when its blocks are given back, each transfer once when it is done, each step once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvrelay.machine.histogram import Histogram
from kvrelay.node.request import NodeRequest
from kvrelay.protocol import histograms as names
from kvrelay.protocol.messages.base import HistogramReport, LayerTransfer

_FROM_TO: tuple[tuple[str, str, str], ...] = (
    (names.QUEUE, "queued", "admitted"),
    (names.PREFILL, "prefill", "computed"),
    (names.RESERVATION, "admitted", "reserved"),
    (names.HAND_OFF, "handed_off", "decode"),
    (names.DECODE, "decode", "done"),
    (names.INFERENCE, "begun", "over"),
    (names.REQUEST, "arrived", "done"),
    (names.FIRST_TOKEN, "queued", "computed"),
)
"""Stages with the marks between which they are. Those that ``_moments`` derives: ``admitted``: it got its blocks.
``computed``: its first output token was. ``begun``: the node did its first work for it. ``over``: its last token."""


class StageTimes:
    """Histograms by name and label, and counters of prompt tokens by source. They only grow."""

    def __init__(self) -> None:
        self._histograms: dict[tuple[str, str], Histogram] = {}
        self.counters = dict.fromkeys(
            ("prompt_tokens_computed", "prompt_tokens_cached", "prompt_tokens_stored", "prompt_tokens_received"), 0.0
        )

    def report(self) -> list[HistogramReport]:
        """Return every histogram that has any value."""
        return [histogram.report(*key) for key, histogram in self._histograms.items()]

    def step(self, seconds: float, num_outputs: int) -> None:
        """Note a step of ``seconds`` in which ``num_outputs`` decodes got their next tokens."""
        self._of(names.INTER_TOKEN).observe(seconds, num_outputs)

    def transferred(
        self, request: NodeRequest[Any], link: str, num_bytes: int, layers: Sequence[LayerTransfer]
    ) -> None:
        """Note the transfer of the KV of ``request`` to its decode node.

        Its time is from the first frame sent to the last written; its hidden share is the part of that time in which
        the prompt was still being computed.
        """
        self._of(names.TRANSFER_BYTES, link).observe(num_bytes)
        if not layers:
            return
        began_s, ended_s = min(layer.first_sent_s for layer in layers), max(layer.last_written_s for layer in layers)
        seconds = max(0.0, ended_s - began_s)
        self._of(names.TRANSFER, link).observe(seconds)
        computed_s = next((at_s for name, at_s in request.marks if name == "first_token"), None)
        if computed_s is not None and seconds > 0:
            hidden = min(1.0, max(0.0, (computed_s - began_s) / seconds))
            self._of(names.TRANSFER_HIDDEN, link).observe(hidden)

    def ended(self, request: NodeRequest[Any]) -> None:
        """Note the stages that ``request`` has gone through on this node, however it ended."""
        moments = _moments(request)
        for stage, began, ended in _FROM_TO:
            if began in moments and ended in moments:
                self._of(stage).observe(max(0.0, moments[ended] - moments[began]))
        self._preempted(request)
        if "computed" in moments or "handed_off" in moments:
            for source, num_tokens in request.prompt_sources().items():
                self.counters[f"prompt_tokens_{source}"] += num_tokens
        num_given = len(request.spec.prompt_token_ids) + len(request.spec.output_token_ids)
        num_gaps = len(request.token_ids) - num_given - ("queued" in moments)  # the first token of all has no gap
        if "decode" in moments and "done" in moments and num_gaps > 0:
            self._of(names.PER_OUTPUT_TOKEN).observe(max(0.0, moments["done"] - moments["decode"]) / num_gaps)

    def _preempted(self, request: NodeRequest[Any]) -> None:
        """Note each time from a preemption until the request decoded again."""
        since_s: float | None = None
        for name, at_s in request.marks:
            if name == "preempted":
                since_s = at_s
            elif name == "decode" and since_s is not None:
                self._of(names.PREEMPTED).observe(max(0.0, at_s - since_s))
                since_s = None

    def _of(self, name: str, label: str = "") -> Histogram:
        key = (name, label)
        if key not in self._histograms:
            self._histograms[key] = Histogram(names.BOUNDS[name])
        return self._histograms[key]


def _moments(request: NodeRequest[Any]) -> dict[str, float]:
    """Return the first time of each mark, and of the moments that follow from them."""
    moments: dict[str, float] = {}
    for name, at_s in request.marks:
        moments.setdefault(name, at_s)
    if "queued" in moments:
        _first_of(moments, "admitted", ("load", "prefill"))
        _first_of(moments, "computed", ("first_token", "decode"))
    _first_of(moments, "arrived", ("queued", "reserved"))
    _first_of(moments, "begun", ("prefill", "decode"))
    _first_of(moments, "over", ("done", "first_token"))
    return moments


def _first_of(moments: dict[str, float], name: str, marks: Sequence[str]) -> None:
    """Add moment ``name``: that of the first of ``marks`` there is."""
    for mark in marks:
        if mark in moments:
            moments[name] = moments[mark]
            return
