"""How long the stages of requests took on a node, from the marks of their timelines."""

from __future__ import annotations

import pytest

from decode_node.request import DecodeRequest, DecodeStatus
from kvrelay.machine.histogram import Histogram
from kvrelay.metrics import vllm
from kvrelay.metrics.buckets import cumulative
from kvrelay.node.stage_times import StageTimes
from kvrelay.protocol import histograms
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import HistogramReport, LayerTransfer, Load
from kvrelay.protocol.request import RequestSpec, SamplingParams
from prefill_node.request import PrefillRequest
from router.node_totals import NodeTotals

SPEC = RequestSpec(
    request_id=RequestId("r"), epoch=1, prompt_token_ids=[1] * 10, sampling=SamplingParams(max_tokens=8, seed=0)
)


def marked(request: PrefillRequest | DecodeRequest, *marks: tuple[str, float]) -> StageTimes:
    """Return the stages after the end of ``request``, which had ``marks``."""
    request.marks += marks
    stages = StageTimes()
    stages.ended(request)
    return stages


def means(stages: StageTimes) -> dict[str, float]:
    """Return the mean of each histogram."""
    return {report.name: report.total / sum(report.counts) for report in stages.report()}


def prefill_request() -> PrefillRequest:
    return PrefillRequest(SPEC, None, [], 0.0)


def test_stages_on_a_prefill_node() -> None:
    marks = (("queued", 0.0), ("prefill", 1.0), ("reserved", 1.5), ("first_token", 3.0), ("transferred", 4.0))
    request = prefill_request()
    request.token_ids.append(5)
    request.num_cached_tokens, request.num_stored_tokens = 6, 2

    stages = marked(request, *marks)

    assert means(stages) == {"queue": 1.0, "prefill": 2.0, "reservation": 0.5, "inference": 2.0, "first_token": 3.0}
    sources = {name.removeprefix("prompt_tokens_"): count for name, count in stages.counters.items()}
    assert sources == {"computed": 4, "cached": 4, "stored": 2, "received": 0}


def test_a_read_from_the_store_is_no_queue_and_no_prefill() -> None:
    stages = marked(
        prefill_request(), ("queued", 0.0), ("load", 1.0), ("loaded", 4.0), ("prefill", 4.0), ("first_token", 6.0)
    )

    assert means(stages) == {"queue": 1.0, "prefill": 2.0, "inference": 2.0, "first_token": 6.0}


def test_stages_on_a_decode_node_that_preempts() -> None:
    request = DecodeRequest(SPEC, [], DecodeStatus.RESERVING, 0.0, PeerId("p0#1"))
    request.num_matched_tokens = 4
    request.token_ids += [5, 6, 7, 8]
    marks = (
        *(("reserved", 1.0), ("handed_off", 2.0), ("kv_arrived", 2.5), ("decode", 2.5), ("preempted", 4.0)),
        *(("prefill", 6.0), ("decode", 7.0), ("done", 10.5)),
    )

    stages = marked(request, *marks)

    assert means(stages) == {
        "hand_off": 0.5,
        "decode": 8.0,
        "preempted": 3.0,
        "inference": 4.5,
        "request": 9.5,
        "per_output_token": 2.0,
    }
    assert stages.counters == {
        "prompt_tokens_computed": 0,
        "prompt_tokens_cached": 4,
        "prompt_tokens_stored": 0,
        "prompt_tokens_received": 6,
    }


def test_a_request_that_was_never_admitted_has_no_stages() -> None:
    stages = marked(prefill_request(), ("queued", 0.0))

    assert not stages.report()
    assert not any(stages.counters.values())


@pytest.mark.parametrize(
    ("computed_s", "hidden"), [(0.5, 0.0), (2.0, 0.5), (9.0, 1.0)], ids=["before", "during", "after"]
)
def test_the_hidden_share_of_a_transfer_is_what_overlaps_the_prefill(computed_s: float, hidden: float) -> None:
    request = prefill_request()
    request.mark("first_token", computed_s)
    stages = StageTimes()

    stages.transferred(request, "tcp", 4096, [LayerTransfer(0, 1.0, 2.0, 2048), LayerTransfer(1, 1.5, 3.0, 2048)])

    assert means(stages) == {"transfer": 2.0, "transfer_bytes": 4096, "transfer_hidden": hidden}
    assert {report.label for report in stages.report()} == {"tcp"}


def test_totals_grow_by_what_nodes_count_and_by_nothing_twice() -> None:
    queue = Histogram(histograms.STAGE_BOUNDS_S)
    totals, before = NodeTotals(), Load()
    for value in (0.004, 3.0, 9999.0):
        queue.observe(value)
        after = Load(counters={"preemptions": value}, histograms=[queue.report("queue"), queue.report("hand_off")])
        totals.add_growth(before, after)
        before = after
    totals.add_growth(before, before)
    other_version = Load(
        counters={}, histograms=[HistogramReport("queue", "", [7], 7.0), HistogramReport("x", "", [], 0)]
    )
    totals.add_growth(before, other_version)

    assert totals.preemptions == 9999.0
    assert totals.stages["queue"].counts == queue.counts
    assert totals.stages["queue"].total == pytest.approx(queue.total)


def test_buckets_are_taken_from_finer_ones() -> None:
    assert cumulative((1.0, 2.0, 4.0), [1, 2, 3, 4], (2.0, 4.0)) == [("2.0", 3), ("4.0", 6), ("+Inf", 10)]
    assert cumulative((1.0, 2.0), [1, 2, 3]) == [("1.0", 1), ("2.0", 3), ("+Inf", 6)]


@pytest.mark.parametrize("name", vllm.HISTOGRAM_NAMES)
def test_histograms_have_the_bounds_of_vllm_among_theirs(name: str) -> None:
    family = vllm.VllmFamilies("demo").histogram(Histogram(histograms.BOUNDS[name]).report(name))

    bounds = [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]
    assert len(bounds) in (
        len(vllm.REQUEST_BOUNDS_S) + 1,
        len(vllm.FIRST_TOKEN_BOUNDS_S) + 1,
        len(vllm.TOKEN_BOUNDS_S) + 1,
    )
    assert list(histograms.BOUNDS[name]) == sorted(set(histograms.BOUNDS[name]))
