"""The results of vs_vllm.py as tables and a picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from support.limits import Limits
from support.vllm_cases import CLUSTERS, METRICS, PRESET, VLLM, Case, Results, predicted


@dataclass(frozen=True)
class Row:
    case: Case
    metric: str
    ours: float
    theirs: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def aim(self) -> float | None:
        return self.case.aims.get(self.metric)

    @property
    def more_is_better(self) -> bool:
        return self.metric == "tok/s"

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        return "met" if (self.ratio >= self.aim if self.more_is_better else self.ratio <= self.aim) else "missed"


def rows(cases: Sequence[Case], results: Results, limits: tuple[Limits, Limits]) -> list[Row]:
    """Return a row for each case and metric that was measured on both sides."""
    made = []
    for case in cases:
        ours, theirs = (results.get(name, {}).get(str(case.load), []) for name in (case.cluster, VLLM))
        expected = predicted(case, *limits)
        for metric in METRICS:
            if ours and theirs and metric in ours[0]:
                left, right = (statistics.median(run[metric] for run in runs) for runs in (ours, theirs))
                made.append(Row(case, metric, left, right, expected[metric]))
    return made


def table(rows: Sequence[Row], limits: tuple[Limits, Limits]) -> Table:
    one, both = limits
    title = (
        f"kvrelay against vLLM, {PRESET}, medians; limits in {one.dtype}, one core: {one.gflops:.0f} GFLOP/s, "
        f"{one.gb_s:.0f} GB/s, both: {both.gflops:.0f}, {both.gb_s:.0f}"
    )
    made = Table(title=title)
    for heading in ("case", "cluster", "load", "metric", "kvrelay", "vLLM", "ratio", "aim", "", "by arithmetic"):
        made.add_column(
            heading, justify="right" if heading in ("kvrelay", "vLLM", "ratio", "by arithmetic") else "left"
        )
    last = None
    for row in rows:
        aim = "" if row.aim is None else f"{'>=' if row.more_is_better else '<='} {row.aim}"
        head = ("", "", "") if row.case is last else (row.case.name, row.case.cluster, str(row.case.load))
        figures = (f"{row.ours:.1f}", f"{row.theirs:.1f}", f"{row.ratio:.2f}")
        made.add_row(*head, row.metric, *figures, aim, row.verdict, f"{row.predicted:.1f}")
        last = row.case
    return made


def cpu_table(cases: Sequence[Case], results: Results) -> Table:
    """CPU seconds of each process per second of the run, medians."""
    made = Table("server", "load", "cores used by its processes", "by all idle servers")
    loads = dict.fromkeys(case.load for case in cases)
    for load in loads:
        for name in (*CLUSTERS, VLLM):
            runs = results.get(name, {}).get(str(load), [])
            if not runs:
                continue
            titles = [key for key in runs[0] if key.startswith("cpu ")]
            share = {key: statistics.median(run.get(key, 0.0) / run["elapsed_s"] for run in runs) for key in titles}
            used = ", ".join(
                f"{key.removeprefix('cpu ')} {value:.2f}" for key, value in share.items() if value >= 0.005
            )
            made.add_row(name, str(load), used, f"{max(run['idle_share'] for run in runs):.2f}")
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw how much better kvrelay is than vLLM in each row, aims as marks. Needs the extra ``bench``."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot  # noqa: PLC0415

    def times_better(row: Row, ratio: float) -> float:
        return ratio if row.more_is_better else 1 / ratio

    colours = {"met": "#2a7f62", "missed": "#c8553d", "": "#9aa5b1"}
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(8.0, 0.7 + 0.25 * (len(rows) + 1.6 * len({row.case.name for row in rows}))))
    beside, at = axes.get_yaxis_transform(), 0.0
    places = []
    for case, group in itertools.groupby(rows, key=lambda row: row.case):
        axes.text(0.0, at, f"{case.name}: {case.load}, {case.cluster}", transform=beside, weight="bold", va="center")
        first = at + 1
        for row in group:
            at += 1
            axes.barh(at, times_better(row, row.ratio) - 1, left=1, height=0.7, color=colours[row.verdict])
            axes.text(1.02, at, f"{row.ours:.0f} : {row.theirs:.0f}", transform=beside, va="center", color="#444")
            if row.aim is not None:
                axes.plot([times_better(row, row.aim)] * 2, [at - 0.45, at + 0.45], color="black", linewidth=1.8)
            places.append((at, row.metric if row.more_is_better else f"{row.metric}, ms"))
        axes.plot([1, 1], [first - 0.5, at + 0.5], color="black", linewidth=0.8)
        at += 1.6
    axes.text(1.02, -0.1, "kvrelay : vLLM", transform=beside, va="center", color="#444")
    axes.set_yticks(*zip(*places, strict=True))
    axes.set_ylim(at - 0.9, -0.7)
    marks = [times_better(row, ratio) for row in rows for ratio in (row.ratio, row.aim) if ratio is not None]
    axes.set_xscale("log")
    axes.set_xticks(ticks := [2.0**power for power in range(-4, 8)], [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(0.6, 0.9 * min(marks)), max(2.1, 1.1 * max(marks)))
    axes.set_xlabel("times better than vLLM; black: the aim; green: met, red: missed")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
