"""Client metrics of a run, and tables that compare runs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from rich.table import Table
from support.completions import Completion


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Latencies:
    """Of one run. Times are the model's."""

    total_s: float
    output_tokens_per_s: float
    mean_ttft_s: float
    p50_ttft_s: float
    p90_ttft_s: float
    p99_ttft_s: float
    longest_ttft_s: float
    mean_itl_s: float
    p99_itl_s: float

    @classmethod
    def of(cls, completions: Sequence[Completion], wall_s: float, time_scale: float = 1.0) -> Latencies:
        """Measure ``completions``, which took ``wall_s`` in all, on nodes slower than the model by ``time_scale``."""
        ttfts_s = [completion.ttft_s / time_scale for completion in completions]
        gaps = (itertools.pairwise(completion.token_s) for completion in completions)
        itls_s = [(after - before) / time_scale for pairs in gaps for before, after in pairs]
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        return cls(
            total_s=wall_s / time_scale,
            output_tokens_per_s=num_tokens * time_scale / wall_s,
            mean_ttft_s=statistics.mean(ttfts_s),
            p50_ttft_s=percentile(ttfts_s, 0.5),
            p90_ttft_s=percentile(ttfts_s, 0.9),
            p99_ttft_s=percentile(ttfts_s, 0.99),
            longest_ttft_s=max(ttfts_s),
            mean_itl_s=statistics.mean(itls_s),
            p99_itl_s=percentile(itls_s, 0.99),
        )

    def __str__(self) -> str:
        return ", ".join(f"{title(name)} {shown(name, value)}" for name, value in values(self).items())


def values(latencies: Latencies) -> dict[str, float]:
    return {field.name: getattr(latencies, field.name) for field in fields(latencies)}


def title(name: str) -> str:
    """Return how a field is called in tables."""
    if name in ("total_s", "output_tokens_per_s"):
        return {"total_s": "total s", "output_tokens_per_s": "output tokens/s"}[name]
    return name.removesuffix("_s").replace("_", " ").replace("ttft", "TTFT").replace("itl", "ITL") + " ms"


def shown(name: str, value: float) -> str:
    return f"{value:,.1f}" if name in ("total_s", "output_tokens_per_s") else f"{1e3 * value:,.0f}"


def rounds_table(heading: str, rounds: Sequence[Mapping[str, Latencies]]) -> Table:
    """Return what each round gave and, in the last rows, the median ratio of each other contestant to the first."""
    table = Table("round", title=heading, title_justify="left")
    table.add_column("scheduler", no_wrap=True)
    names = [field.name for field in fields(Latencies)]
    for name in names:
        table.add_column(title(name), justify="right")
    for number, runs in enumerate(rounds, 1):
        for place, (contestant, run) in enumerate(runs.items(), 1):
            cells = (shown(name, value) for name, value in values(run).items())
            table.add_row(str(number), contestant, *cells, end_section=place == len(runs))
    first, *others = rounds[0]
    for other in others:
        pairs = [(values(runs[first]), values(runs[other])) for runs in rounds]
        medians = (statistics.median(mine[name] / base[name] for base, mine in pairs) for name in names)
        table.add_row("median", f"{other}/{first}", *(f"{median:.2f}" for median in medians))
    return table
