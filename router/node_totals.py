"""What all nodes have counted while this router knew them, those that have left included."""

from __future__ import annotations

from kvrelay.machine.histogram import Histogram
from kvrelay.protocol import histograms
from kvrelay.protocol.messages.base import Load


class NodeTotals:
    """Totals over all nodes. They only grow, also when nodes restart or leave.

    What a node counted before its first heartbeat to this router is left out: after a restart of the router it would
    look like work that was done at once.
    """

    def __init__(self) -> None:
        self.preemptions = 0.0
        self.stages = {
            name: Histogram(histograms.BOUNDS[name])
            for name in (histograms.QUEUE, histograms.PREFILL, histograms.DECODE)
        }

    def add_growth(self, before: Load, after: Load) -> None:
        """Add what a node has counted between two of its heartbeats."""
        name = "preemptions"
        self.preemptions += max(0.0, after.counters.get(name, 0.0) - before.counters.get(name, 0.0))
        known = {report.name: report for report in before.histograms}
        for report in after.histograms:
            if report.name in self.stages:
                self.stages[report.name].add_growth(known.get(report.name), report)
