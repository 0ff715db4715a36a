"""The policy ``ttft``: predictions from measured speeds, the pair they lead to, limits of the time to first token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from driver import Driver, new_request, peer
from fake_nodes import GEOMETRY, register
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvrelay.config.sections import RoutingPolicy
from kvrelay.machine.contract import PeerLost
from kvrelay.protocol.block_hash import PREFIX_KEY_BYTES, BlockHasher
from kvrelay.protocol.ids import PeerId, RequestId, peer_name
from kvrelay.protocol.messages.base import Heartbeat, Load
from kvrelay.protocol.messages.node_to_router import Leaving, PrefixCacheChanged
from kvrelay.protocol.messages.router_to_node import Prefill, Registered
from kvrelay.protocol.quantities import MAX_DURATION_S
from kvrelay.protocol.request import FinishReason
from router.admission import MAX_PREDICTED_AT_ONCE, TTFT_LIMIT_HEADER
from router.events import ClientGone, NewRequest, RequestErrored
from router.least_ttft import EVICTION_FACTOR, LeastTTFT
from router.limits import Limits
from router.node_table import Node, NodeTable
from router.policy import REQUEST_TOKENS
from router.prediction import Prediction, Predictions
from router.request import RoutedRequest
from router.speeds import DEFAULT_TOKENS_PER_S, exposed_transfer_s, link_speeds, predict

BLOCK = GEOMETRY.block_size
TOKEN_BYTES = GEOMETRY.block_bytes / BLOCK


def keys(token_ids: list[int]) -> list[bytes]:
    hashes = BlockHasher(GEOMETRY.model_digest, BLOCK).hashes(token_ids)
    return [block_hash[:PREFIX_KEY_BYTES] for block_hash in hashes]


def report(*token_ids: int) -> PrefixCacheChanged:
    return PrefixCacheChanged(number=0, added=b"".join(keys(list(token_ids))))


def request(num_tokens: int, max_tokens: int = 8) -> RoutedRequest:
    return RoutedRequest(new_request(prompt=list(range(num_tokens)), max_tokens=max_tokens), 0.0)


class Cluster:
    """A table of nodes with loads, and the policy that chooses among them."""

    def __init__(self) -> None:
        self.table = NodeTable("demo", 5.0)
        self.policy = LeastTTFT(self.table)

    def add(
        self,
        name: str,
        *,
        tokens_per_s: float = 0.0,
        pending: int = 0,
        has: int = 0,
        free: int = 1000,
        links: dict[str, float] | None = None,
    ) -> Node:
        role = {"p": "prefill", "d": "decode", "m": "mixed"}[name[0]]
        node = self.table.add(PeerId(peer(name)), register(name, role), 0.0)
        node.take_load(Load(prefill_tokens_per_s=tokens_per_s, link_bytes_per_s=links or {}, free_blocks=free))
        node.num_heartbeats = 1
        node.prefixes.take(report(*range(has)))
        if pending:
            node.pending[new_request(f"on {name}").request_id] = pending
        return node

    def choose(self, prompt: RoutedRequest) -> tuple[str, str | None]:
        """Return the names of the first node and, if that is a prefill node, of the decode node."""
        nodes = list(self.table)
        first = self.policy.choose([node for node in nodes if node.registration.role != "decode"], prompt)
        if first.registration.role != "prefill":
            return first.node_id, None
        prompt.prefill = first.peer
        second = self.policy.choose([node for node in nodes if node.registration.role == "decode"], prompt)
        return first.node_id, second.node_id


# ---------------------------------------------------------------- predictions


def test_a_prediction_is_the_wait_for_other_prompts_and_for_what_the_prefix_cache_lacks() -> None:
    node = Cluster().add("p0", tokens_per_s=200.0, pending=500, has=6 * BLOCK)
    prediction = predict(node, request(10 * BLOCK), 1.0)
    assert prediction == (500 / 200, 4 * BLOCK / 200, 4 * BLOCK, True)
    assert prediction.ttft_s == 500 / 200 + 4 * BLOCK / 200


def test_a_node_that_has_measured_nothing_counts_as_being_like_the_others() -> None:
    cluster = Cluster()
    unknown = cluster.add("p0")
    assert cluster.policy.predict(unknown, request(100)) == (0.0, 100 / DEFAULT_TOKENS_PER_S, 100, False)
    cluster.add("p1", tokens_per_s=100.0)
    cluster.add("m0", tokens_per_s=300.0)
    assert cluster.policy.predict(unknown, request(100)) == (0.0, 100 / 200, 100, False)


@pytest.mark.parametrize(
    ("num_bytes", "prefill_s", "expected"),
    [
        (1000, 10.0, 10 / 4),  # hidden but for the last of 4 layers
        (1000, 8.0, 10 / 4),
        (1000, 7.0, 3.0),  # 10 s of transfer, 7 of them hidden
        (1000, 0.0, 10.0),
        (0, 0.0, 0.0),
    ],
)
def test_a_transfer_delays_the_second_token_by_what_the_prefill_does_not_hide(
    num_bytes: int, prefill_s: float, expected: float
) -> None:
    assert exposed_transfer_s(num_bytes, 100.0, prefill_s, num_layers=4) == pytest.approx(expected)


def test_a_link_that_moved_nothing_counts_as_being_like_the_others_of_the_node() -> None:
    cluster = Cluster()
    assert link_speeds(cluster.add("p0", links={"d0": 100.0, "d2": 300.0})) == ({"d0": 100.0, "d2": 300.0}, 200.0)
    assert link_speeds(cluster.add("p1")) == ({}, 1e9)


# ---------------------------------------------------------------- choices


def test_the_faster_node_gets_the_prompt_though_more_waits_there() -> None:
    cluster = Cluster()
    cluster.add("d0")
    cluster.add("p0", tokens_per_s=100.0, pending=100)
    fast = cluster.add("p1", tokens_per_s=1000.0, pending=1000)
    assert cluster.choose(request(110)) == ("p1", "d0")  # 1.11 s; p0 would take 2.1 s
    fast.pending[new_request("more").request_id] = 1000
    assert cluster.choose(request(110)) == ("p0", "d0")


@pytest.mark.parametrize(("waits", "expected"), [(24 * BLOCK - 1, "p0"), (24 * BLOCK + 1, "p1")])
def test_a_prompt_goes_where_its_prefix_is_if_all_wait_less_then(waits: int, expected: str) -> None:
    """To compute a token that p0 has, and those for which there is no room then, is worth a wait for three."""
    cluster = Cluster()
    cluster.add("d0")
    cluster.add("p0", tokens_per_s=100.0, has=8 * BLOCK, pending=waits)
    cluster.add("p1", tokens_per_s=100.0)
    assert cluster.choose(request(10 * BLOCK)) == (expected, "d0")


def test_equals_take_turns() -> None:
    cluster = Cluster()
    for name in ("p0", "p1", "d0", "d1"):
        cluster.add(name)
    assert [cluster.choose(request(20)) for _ in range(3)] == [("p0", "d0"), ("p1", "d1"), ("p0", "d0")]


def test_on_a_slow_link_the_decode_node_that_has_the_prefix_is_better_than_an_idle_one() -> None:
    for bytes_per_s, expected in ((100 * TOKEN_BYTES, "d0"), (1e6 * TOKEN_BYTES, "d1")):
        cluster = Cluster()
        cluster.add("p0", tokens_per_s=1000.0, links={"d0": bytes_per_s, "d1": bytes_per_s})
        cluster.add("d0", has=9 * BLOCK, pending=100)
        cluster.add("d1")
        assert cluster.choose(request(10 * BLOCK)) == ("p0", expected)


def test_a_decode_node_without_blocks_for_the_rest_of_the_prompt_comes_last() -> None:
    cluster = Cluster()
    cluster.add("p0", links={"d0": 1.0, "d1": 1.0})
    cluster.add("d0", has=8 * BLOCK, free=1)
    cluster.add("d1", free=10)
    assert cluster.choose(request(10 * BLOCK)) == ("p0", "d1")


def test_of_equal_prefill_nodes_the_one_with_the_faster_link_is_chosen() -> None:
    cluster = Cluster()
    cluster.add("p0", tokens_per_s=1000.0, links={"d0": 100 * TOKEN_BYTES})
    cluster.add("p1", tokens_per_s=1000.0, links={"d0": 1e6 * TOKEN_BYTES})
    cluster.add("d0")
    assert [cluster.choose(request(200)) for _ in range(3)] == [("p1", "d0")] * 3
    assert [cluster.choose(request(200, max_tokens=1))[0] for _ in range(3)] != ["p1"] * 3  # nothing moves


def test_a_mixed_node_transfers_nothing() -> None:
    cluster = Cluster()
    cluster.add("p0", tokens_per_s=1000.0, links={"d0": 100 * TOKEN_BYTES})
    cluster.add("d0")
    cluster.add("m0", tokens_per_s=500.0)
    assert cluster.choose(request(200)) == ("m0", None)


NODES = st.tuples(st.integers(0, 3000), st.integers(0, 10), st.sampled_from([0.0, 50.0, 900.0, 5000.0]))
"""Pending tokens, blocks of the prompt in the prefix cache, speed."""


@given(st.lists(NODES, min_size=1, max_size=4), st.lists(NODES, min_size=1, max_size=4), st.data())
def test_no_pair_is_better_than_the_one_that_is_chosen(
    prefill: list[tuple[int, int, float]], decode: list[tuple[int, int, float]], data: st.DataObject
) -> None:
    cluster, prompt = Cluster(), request(12 * BLOCK)
    for index, (pending, blocks, speed) in enumerate(decode):
        cluster.add(f"d{index}", pending=pending, has=blocks * BLOCK, tokens_per_s=speed)
    for index, (pending, blocks, speed) in enumerate(prefill):
        links = {f"d{number}": data.draw(st.floats(1e3, 1e9)) for number in range(len(decode))}
        cluster.add(f"p{index}", pending=pending, has=blocks * BLOCK, tokens_per_s=speed, links=links)
    nodes = {str(node.node_id): node for node in cluster.table}
    speeds = [node.load.prefill_tokens_per_s for node in nodes.values() if node.load.prefill_tokens_per_s]
    typical = sum(speeds) / len(speeds) if speeds else DEFAULT_TOKENS_PER_S

    def second_token_s(first: str, second: str) -> float:
        p, d = nodes[first], nodes[second]
        prediction = predict(p, prompt, typical)
        num_bytes = (prompt.num_tokens - prompt.num_cached_on(d)) * TOKEN_BYTES
        num_waiting = min(bool(node.pending_tokens) for name, node in nodes.items() if name[0] == "p")
        weight = EVICTION_FACTOR * (1 + num_waiting) - 1
        others_s = (prompt.num_tokens - prompt.num_cached_on(p)) * weight / typical
        exposed_s = exposed_transfer_s(num_bytes, p.load.link_bytes_per_s[second], prediction.prefill_s, 2)
        return prediction.ttft_s + others_s + exposed_s + (d.pending_tokens + REQUEST_TOKENS * d.num_requests) / typical

    pairs = {(p, d): second_token_s(p, d) for p in nodes if p[0] == "p" for d in nodes if d[0] == "d"}
    chosen = cluster.choose(prompt)
    assert chosen[1] is not None
    assert pairs[chosen[0], chosen[1]] == pytest.approx(min(pairs.values()))


def test_where_all_nodes_are_busy_a_longer_wait_is_worth_it() -> None:
    """With a prompt waiting everywhere, computing a token again also delays the next one to come."""
    for idle, expected in ((True, "p1"), (False, "p0")):
        cluster = Cluster()
        cluster.add("d0")
        cluster.add("p0", tokens_per_s=100.0, has=8 * BLOCK, pending=30 * BLOCK)
        cluster.add("p1", tokens_per_s=100.0, pending=0 if idle else 1)
        assert cluster.choose(request(10 * BLOCK)) == (expected, "d0")


# ---------------------------------------------------------------- in the machine


def cluster_of(nodes: str, slo_s: float | None = None, **options: Any) -> Driver:
    driver = Driver(nodes, policy="ttft", limits=Limits(ttft_slo_s=slo_s), **options)
    for name in nodes.split():
        driver.receive(peer(name), report())
    return driver


def measured(driver: Driver, name: str, tokens_per_s: float, **load: Any) -> None:
    load = {"free_blocks": 1000, **load}
    driver.receive(peer(name), Heartbeat(load=Load(prefill_tokens_per_s=tokens_per_s, **load)))


def prompt(request_id: str, num_tokens: int, *, first: int = 0, max_ttft_s: float | None = None) -> NewRequest:
    new = new_request(request_id, prompt=list(range(first, first + num_tokens)))
    return replace(new, max_ttft_s=max_ttft_s)


def refusal(driver: Driver, request_id: str) -> RequestErrored:
    [ending] = driver.endings(request_id)
    assert isinstance(ending, RequestErrored)
    return ending


def test_nodes_are_asked_for_their_prefix_caches() -> None:
    driver = Driver("p0 d0", policy="ttft")
    assert [message.wants_prefixes for _, message in driver.take_sent(Registered)] == [True, True]


def test_nothing_that_a_node_measured_counts_after_its_restart() -> None:
    driver = cluster_of("p0 p1 d0")
    measured(driver, "p0", 10.0)
    measured(driver, "p1", 1000.0)
    driver.submit(prompt("a", 100))
    assert driver.dispatched()[0] == peer("p1")
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    driver.join("p0", "b")
    again = driver.machine.node_table.get(PeerId(peer("p0", "b")))
    assert again is not None
    assert (again.load.prefill_tokens_per_s, again.prefixes.num_cached_blocks(keys(list(range(100))))) == (0.0, 0)
    driver.submit(prompt("b", 100, first=1000))
    assert driver.dispatched()[0] == peer("p0", "b")


def test_a_node_that_is_all_but_still_refuses_for_a_finite_time() -> None:
    """Before, the header ``Retry-After`` of infinite seconds could not be written."""
    driver = cluster_of("p0 d0", slo_s=2.0)
    measured(driver, "p0", 5e-324)
    driver.submit(prompt("late", 200))
    assert refusal(driver, "late").retry_after_s == MAX_DURATION_S


def test_a_late_first_token_is_refused_before_any_node_hears_of_it() -> None:
    driver = cluster_of("p0 d0", slo_s=2.0)
    measured(driver, "p0", 100.0)
    driver.submit(prompt("fits", 200))
    assert driver.dispatched()[2].request_id == "fits"
    driver.sent.clear()
    driver.submit(prompt("late", 150, first=1000))
    error = refusal(driver, "late")
    assert (error.error.code, error.error.http_status, error.param) == ("ttft_limit_exceeded", 429, None)
    assert error.retry_after_s == pytest.approx(1.5)
    expected = (
        "the first token is predicted after 3.5 s: 2 s for other prompts and 1.5 s for this one; the limit is 2 s"
    )
    assert error.error.message == f"{expected} (router.ttft_slo_s)"
    assert driver.sent == []
    assert not driver.timers.keys() & {("late", "deadline")}
    counters = driver.machine.requests.counters
    assert (counters.refused, counters.refused_for_ttft, counters.submitted) == (1, 1, 1)
    p0 = driver.machine.node_table.get(PeerId(peer("p0")))
    assert p0 is not None
    assert list(p0.pending) == ["fits"]
    assert p0.prefixes.num_cached_blocks(keys(list(range(1000, 1150)))) == 0  # so that it is refused again
    driver.tokens("p0", 0, [1], request_id="fits")
    driver.tokens("d0", 1, [2], request_id="fits", finish=FinishReason.STOP)
    driver.machine.assert_quiescent()
    driver.submit(prompt("late", 150, first=1000))
    assert driver.dispatched()[2].request_id == "late"


@pytest.mark.parametrize(("own_s", "slo_s", "is_served"), [(1.0, None, False), (1.0, 9.0, False), (9.0, 1.0, True)])
def test_the_limit_of_a_request_replaces_that_of_the_config(own_s: float, slo_s: float | None, is_served: bool) -> None:
    driver = cluster_of("p0 d0", slo_s=slo_s)
    measured(driver, "p0", 100.0)
    driver.submit(prompt("r", 150, max_ttft_s=own_s))
    if is_served:
        driver.dispatched()
    else:
        assert refusal(driver, "r").param == TTFT_LIMIT_HEADER
        assert TTFT_LIMIT_HEADER in refusal(driver, "r").error.message


def test_without_a_measured_speed_nothing_is_refused() -> None:
    driver = cluster_of("p0 d0", slo_s=1e-6)
    driver.submit(prompt("r", 500))
    driver.dispatched()


def test_other_policies_predict_nothing_and_refuse_nothing() -> None:
    driver = Driver("p0 d0", policy="least_loaded")
    measured(driver, "p0", 1.0)
    driver.submit(prompt("r", 500, max_ttft_s=0.1))
    driver.dispatched()
    driver.tokens("p0", 0, [1])
    assert not any(sum(found.counts) for found in driver.machine.requests.prediction_errors.values())


@pytest.mark.parametrize("policy", ["ttft", "round_robin", "least_loaded"])
def test_equals_take_turns_whether_requests_have_limits_or_not(policy: RoutingPolicy) -> None:
    driver = Driver("p0 p1 d0", policy=policy)
    measured(driver, "p0", 100.0)
    measured(driver, "p1", 100.0)
    nodes = []
    for number in range(4):
        driver.submit(prompt(f"{number}", 10, first=100 * number, max_ttft_s=60.0))
        nodes.append(driver.dispatched()[0])
        driver.do(ClientGone(RequestId(f"{number}")))
    assert sorted(nodes[:2]) == sorted(nodes[2:]) == [peer("p0"), peer("p1")]


def test_requests_that_belong_together_are_refused_together() -> None:
    driver = cluster_of("p0 d0", slo_s=1.0)
    measured(driver, "p0", 100.0)
    driver.submit(prompt("short", 50), prompt("long", 150, first=500))
    assert {refusal(driver, name).error.code for name in ("short", "long")} == {"ttft_limit_exceeded"}
    assert driver.take_sent(Prefill) == []
    driver.machine.assert_quiescent()


def test_of_many_that_belong_together_some_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes more than a millisecond with dozens of nodes, and the loop is held for all of them."""
    driver = cluster_of("p0 d0", slo_s=60.0)
    measured(driver, "p0", 100.0)
    predicted: list[str] = []
    would_choose = LeastTTFT.would_choose

    def noted(policy: LeastTTFT, candidates: Sequence[Node], request: RoutedRequest) -> Node:
        predicted.append(request.request_id)
        return would_choose(policy, candidates, request)

    monkeypatch.setattr(LeastTTFT, "would_choose", noted)
    monkeypatch.setattr("router.requests.MAX_DISPATCHED_AT_ONCE", 0)
    ids = [f"r{number}" for number in range(MAX_PREDICTED_AT_ONCE + 3)]
    driver.submit(*(prompt(name, 10) for name in ids))
    assert predicted == ids[:MAX_PREDICTED_AT_ONCE]


def test_a_prefix_that_a_node_has_makes_the_difference() -> None:
    driver = cluster_of("p0 d0", slo_s=1.0)
    measured(driver, "p0", 100.0)
    driver.receive(peer("p0"), PrefixCacheChanged(number=1, added=b"".join(keys(list(range(8 * BLOCK))))))
    driver.submit(prompt("known", 10 * BLOCK))
    driver.dispatched()


def errors(driver: Driver) -> dict[str, Any]:
    found = driver.machine.requests.prediction_errors
    return {direction: (sum(histogram.counts), histogram.total) for direction, histogram in found.items()}


def test_the_error_of_a_prediction_is_noted_with_the_first_token() -> None:
    driver = cluster_of("p0 d0")
    measured(driver, "p0", 100.0)
    driver.submit(prompt("r", 100))
    driver.now += 1.5
    driver.tokens("p0", 0, [1])
    driver.tokens("d0", 1, [2])
    assert errors(driver)["late"] == (1, pytest.approx(0.5))
    assert errors(driver)["early"] == (0, 0.0)
    driver.submit(prompt("s", 100, first=1000))  # the prediction is corrected now: 1.5 s
    driver.now += 0.25
    driver.tokens("p0", 0, [1], epoch=2, request_id="s")
    assert errors(driver)["early"] == (1, pytest.approx(1.25))


def test_predictions_are_corrected_by_what_came_of_those_for_prompts_of_similar_lengths() -> None:
    predictions, short, long = Predictions(), Prediction(0.5, 0.5, 100, True), Prediction(1.0, 1.0, 4000, True)
    assert predictions.corrected(short, 10.0) == short
    predictions.observe(short, short, 3.0, 10.0)
    assert predictions.corrected(short, 10.0) == short._replace(queue_s=2.5)
    assert predictions.corrected(long, 10.0) == long
    predictions.observe(short, short, 0.1, 11.0)
    assert 0.5 < predictions.corrected(short, 11.0).queue_s < 2.5
    assert predictions.corrected(short, 71.5) == short  # so long ago that it may be otherwise now


def test_only_what_came_sooner_than_its_prefill_alone_corrects_the_time_of_a_prefill() -> None:
    predictions, raw = Predictions(), Prediction(0.5, 0.5, 100, True)
    predictions.observe(raw, raw, 0.6, 10.0)
    assert predictions.corrected(raw._replace(queue_s=0.0), 10.0) == (0.0, 0.5, 100, True)
    predictions, raw = Predictions(), Prediction(0.5, 0.5, 100, True)
    predictions.observe(raw, raw, 0.1, 10.0)
    corrected = predictions.corrected(raw, 10.0)
    assert corrected.queue_s == 0.0
    assert corrected.prefill_s == pytest.approx(0.1)


def test_what_was_predicted_from_defaults_corrects_nothing() -> None:
    predictions, raw = Predictions(), Prediction(0.5, 0.5, 100, False)
    predictions.observe(raw, raw, 9.0, 10.0)
    assert predictions.corrected(raw, 10.0) == raw


def test_limits_hold_for_corrected_predictions_and_no_longer_than_they_are_known() -> None:
    driver = cluster_of("p0 d0", slo_s=2.0)
    measured(driver, "p0", 100.0)
    driver.submit(prompt("first", 150))
    driver.now += 3.0
    driver.tokens("p0", 0, [1], request_id="first")
    driver.submit(prompt("second", 150, first=1000))  # it would take 3 s, too
    assert refusal(driver, "second").error.code == "ttft_limit_exceeded"
    driver.now += 61.0
    measured(driver, "p0", 100.0)
    driver.submit(prompt("third", 150, first=2000))
    assert driver.endings("third") == []


def test_short_prompts_that_measure_a_low_speed_do_not_lock_long_ones_out() -> None:
    """A step costs something however few tokens it computes: steps of short prompts alone look slow."""
    driver = cluster_of("p0 d0", slo_s=2.0)

    def serve(name: str, num_tokens: int, epoch: int, *, real_s: float) -> bool:
        driver.submit(prompt(name, num_tokens, first=1000 * epoch))
        if driver.endings(name):
            return False
        driver.dispatched()
        driver.now += real_s
        driver.tokens("p0", 0, [1], request_id=name, epoch=epoch)
        driver.do(ClientGone(RequestId(name)))
        return True

    epoch, served = 1, []
    for number in range(20):
        measured(driver, "p0", 100.0)
        epoch += serve(f"short {number}", 10, epoch, real_s=0.1)
        served.append(serve(f"long {number}", 800, epoch, real_s=0.5))
        epoch += served[-1]
        driver.now += 10.0
    assert served[:6] == [False] * 6
    assert all(served[6:])


def test_of_a_request_that_was_retried_no_error_is_noted() -> None:
    driver = cluster_of("p0 d0")
    driver.submit(prompt("r", 100))
    driver.do(PeerLost(PeerId(peer("p0")), "killed"))
    driver.join("p0", "b")
    driver.tokens_from(peer("p0", "b"), 0, [1], epoch=2)
    assert driver.output() == [1]
    assert errors(driver) == {"late": (0, 0.0), "early": (0, 0.0)}


def test_of_a_request_that_a_draining_node_gave_back_only_the_last_attempt_counts() -> None:
    """Before, all that it had waited on the first node made later predictions longer."""
    driver = cluster_of("p0 p1 d0")
    measured(driver, "p0", 100.0)
    measured(driver, "p1", 100.0)
    driver.submit(prompt("r", 100))
    first, _, _ = driver.dispatched()
    driver.now += 20.0
    driver.receive(first, Leaving())
    driver.fail(peer_name(PeerId(first)))
    again, _, spec = driver.dispatched()
    assert again != first
    driver.now += 1.5
    driver.tokens_from(again, 0, [1], epoch=spec.epoch)
    assert errors(driver) == {"late": (1, pytest.approx(0.5)), "early": (0, 0.0)}


@pytest.mark.parametrize("speeds", [{"d0": 0.0}, {"d0": 0.0, "d1": 5e6}, {"d0": math.nan}])
def test_a_link_that_is_said_to_have_no_speed_is_the_last_choice_and_not_the_routers_end(
    speeds: dict[str, float],
) -> None:
    driver = cluster_of("p0 d0 d1")
    measured(driver, "p0", 100.0, link_bytes_per_s=speeds)
    for name in ("d0", "d1"):
        measured(driver, name, 0.0)
    for number in range(3):
        driver.submit(prompt(f"r{number}", 100, first=1000 * number))
        assert driver.dispatched()[1] == peer("d1")


# ---------------------------------------------------------------- decode nodes that compute prompts


@pytest.mark.parametrize(("threshold", "expected"), [(0, "d0"), (99, "d0"), (101, "p0")])
def test_a_decode_node_computes_the_prompt_if_its_first_token_comes_sooner(threshold: int, expected: str) -> None:
    driver = cluster_of("p0 d0", local_prefill_tokens=threshold)
    measured(driver, "p0", 100.0)
    measured(driver, "d0", 300.0)  # together 200 a second: p0 is half a second, or 100 tokens, behind with 75
    driver.submit(prompt("r", 75))
    assert driver.dispatched()[0] == peer(expected)


def test_the_limit_looks_at_the_decode_node_that_would_compute_the_prompt() -> None:
    for threshold, is_refused in ((0, False), (None, True)):
        driver = cluster_of("p0 d0", slo_s=1.0, local_prefill_tokens=threshold)
        measured(driver, "p0", 10.0)
        measured(driver, "d0", 300.0)
        driver.submit(prompt("r", 75))
        assert bool(driver.endings("r")) is is_refused
