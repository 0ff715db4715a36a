"""Figures of recorded runs, against the formulas of ``vllm bench serve`` written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvrelay.bench.compare import compare, ratio_of
from kvrelay.bench.errors import BenchError
from kvrelay.bench.metrics import measure, parse_goodput
from kvrelay.bench.report import as_data, errors, latencies_table, ratios_table, totals_table
from kvrelay.bench.runner import Run
from kvrelay.bench.streams import RequestRecord

# Three requests: one token a chunk, several tokens in the second chunk, a single token; and one that failed.
RECORDS = [
    RequestRecord(10.0, 8, 4, [0.2, 0.25, 0.32, 0.36]),
    RequestRecord(10.5, 16, 9, [0.1, 0.6]),
    RequestRecord(11.0, 4, 1, [0.7]),
    RequestRecord(11.0, error="status 500: broken"),
]
RUN = Run(RECORDS, 2.0)


def test_latencies_of_recorded_chunks() -> None:
    found = measure(RUN, {})

    ttfts = np.array([0.2, 0.1, 0.7]) * 1000
    tpots = np.array([(0.36 - 0.2) / 3, (0.6 - 0.1) / 8]) * 1000  # the request with one token has none
    itls = np.array([0.05, 0.07, 0.04, 0.5]) * 1000  # between chunks, however many tokens they have
    e2els = np.array([0.36, 0.6, 0.7]) * 1000
    for name, values in {"ttft": ttfts, "tpot": tpots, "itl": itls, "e2el": e2els}.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(values.mean())
        assert found[f"std_{name}_ms"] == pytest.approx(values.std())
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(values))
        for percentile in (50, 90, 99):
            assert found[f"p{percentile}_{name}_ms"] == pytest.approx(np.percentile(values, percentile))


def test_throughput_counts_the_tokens_of_usage_of_requests_that_succeeded() -> None:
    found = measure(RUN, {})

    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (28, 14)
    assert found["request_throughput"] == pytest.approx(1.5)
    assert found["output_throughput"] == pytest.approx(7.0)
    assert found["total_token_throughput"] == pytest.approx(21.0)
    assert found["max_concurrent_requests"] == 2


@pytest.mark.parametrize(
    ("goodput", "num_good"),
    [
        ("ttft:300", 2),
        ("ttft:300 tpot:60", 1),
        ("tpot:0.001", 1),  # that of a request with one token is 0
        ("e2el:650 ttft:150", 1),
        ("e2e:0.1", 0),
    ],
)
def test_goodput_counts_requests_within_all_limits(goodput: str, num_good: int) -> None:
    found = measure(RUN, parse_goodput([goodput]))

    assert found["request_goodput"] == pytest.approx(num_good / 2.0)
    assert found["slo_attainment"] == pytest.approx(num_good / 4)


@pytest.mark.parametrize("text", ["ttft", "ttft:", "itl:3", "ttft:-1", "ttft:fast", ":3"])
def test_goodput_limits_that_are_none_are_refused_by_name(text: str) -> None:
    with pytest.raises(BenchError, match="--goodput"):
        parse_goodput([text])


def test_goodput_may_be_one_text_or_several() -> None:
    assert parse_goodput(["ttft:500 tpot:50"]) == parse_goodput(["ttft:500", "tpot:50"]) == {"ttft": 500, "tpot": 50}
    assert parse_goodput(["ttft:500,e2e:9000"]) == {"ttft": 500, "e2el": 9000}


def test_a_run_in_which_everything_failed_has_counts_and_no_latencies() -> None:
    run = Run([RequestRecord(0.0, error="OSError: x")] * 3, 1.0)
    found = measure(run, {"ttft": 1.0})

    assert found["completed"] == 0
    assert found["request_goodput"] == 0
    assert not any(name.endswith("_ms") for name in found)
    assert errors(run) == ["3 times: OSError: x"]
    assert latencies_table(found).row_count == 0


def test_the_json_has_every_request_and_the_tables_every_latency() -> None:
    found = measure(RUN, {"ttft": 1.0})
    data = as_data(RUN, found, {})

    assert data["ttfts"] == [0.2, 0.1, 0.7]
    assert data["output_lens"] == [4, 9, 1]
    assert data["itls"][1] == [0.5]
    assert data["errors"] == ["status 500: broken"]
    assert latencies_table(found).row_count == 4
    assert totals_table(found).row_count == 11


# ---------------------------------------------------------------- comparison


def test_a_constant_ratio_has_a_narrow_interval_around_it() -> None:
    ratio = ratio_of([1.0, 2.0, 4.0], [1.5, 3.0, 6.0])

    assert ratio.mean == pytest.approx(1.5)
    assert [ratio.low, ratio.high] == pytest.approx([1.5, 1.5])
    assert ratio.is_significant


def test_the_interval_is_students_on_the_logarithms() -> None:
    ratio = ratio_of([1.0, 1.0, 1.0], [1.0, 1.1, 1.21])

    logs = np.log([1.0, 1.1, 1.21])
    margin = 4.303 * logs.std(ddof=1) / math.sqrt(3)
    assert ratio == pytest.approx((1.1, math.exp(logs.mean() - margin), math.exp(logs.mean() + margin)))
    assert not ratio.is_significant


def test_one_round_gives_a_ratio_without_an_interval() -> None:
    ratio = ratio_of([2.0], [3.0])

    assert ratio.mean == pytest.approx(1.5)
    assert math.isnan(ratio.low)
    assert not ratio.is_significant
    assert ratios_table({"mean_ttft_ms": ratio}).row_count == 1


def test_figures_that_a_server_lacks_are_not_compared() -> None:
    found = compare([({"mean_ttft_ms": 1.0, "request_throughput": 2.0}, {"request_throughput": 3.0})])

    assert list(found) == ["request_throughput"]
