"""Latencies of streamed answers, computed by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from gpu_check.stream_times import Stream, prefilled, together, tokens_per_s


def test_a_chunk_of_several_tokens_counts_each_of_them() -> None:
    stream = Stream(10.0, [10.5, 10.6, 10.9], [1, 1, 3])

    assert stream.ttft_s == pytest.approx(0.5)
    assert stream.tpot_s == pytest.approx(0.4 / 4)
    assert list(stream.gaps_s(10.5, 10.9)) == pytest.approx([0.1, 0.1, 0.1, 0.1])


def test_a_single_token_has_no_time_per_token() -> None:
    assert Stream(0.0, [1.0], [1]).tpot_s == 0.0


def test_only_what_lies_between_the_last_first_and_the_first_last_token_counts_as_together() -> None:
    early = Stream(0.0, [1.0, 5.0, 6.0, 7.0], [1, 1, 1, 1])
    late = Stream(0.0, [4.0, 6.0, 8.0, 20.0], [1, 1, 2, 1])

    found = together([early, late])

    assert found is not None
    assert found.seconds == 3.0
    assert sorted([*early.gaps_s(4.0, 7.0), *late.gaps_s(4.0, 7.0)]) == [1.0, 1.0, 2.0]
    assert (found.median_s, found.p99_s) == (1.0, 2.0)
    assert found.mean_s == pytest.approx(4 / 3)
    assert found.num_tokens == 1


def test_streams_that_never_decode_at_once() -> None:
    assert together([Stream(0.0, [1.0, 2.0], [1, 1]), Stream(0.0, [3.0, 4.0], [1, 1])]) is None


def test_throughput_is_from_the_first_request_to_the_last_token() -> None:
    assert tokens_per_s([Stream(0.0, [1.0, 2.0], [1, 2]), Stream(0.5, [3.0, 4.0], [1, 4])]) == 2.0


def test_kv_that_moved_before_the_first_token_is_hidden() -> None:
    def mark(name: str, at_s: float, node: str = "p0") -> dict[str, Any]:
        return {"name": name, "at_s": at_s, "node": node}

    timeline = {
        "marks": [mark("prefill", 1.0), mark("first_token", 5.0), mark("first_token", 9.0, "router")],
        "layers": [
            {"layer": 0, "first_sent_s": 2.0, "last_written_s": 4.0},
            {"layer": 1, "first_sent_s": 3.0, "last_written_s": 6.0},
        ],
    }

    assert prefilled(timeline) == (4.0, 4.0, 3.0, 1.0)
