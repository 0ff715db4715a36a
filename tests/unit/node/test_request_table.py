"""A request's status and the container it is in change together."""

from __future__ import annotations

import pytest
from support.machines import spec

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.requests import Requests
from kvrelay.config.cluster_config import SchedulerConfig
from kvrelay.errors import LocalProtocolError
from kvrelay.node.request_table import RequestSet
from kvstore.blocks.kv_cache import KVCache


def table() -> Requests:
    return Requests(SchedulerConfig(), KVCache(8), 4)


def request(name: str, status: DecodeStatus) -> DecodeRequest:
    return DecodeRequest(spec(name), [], status, 1.0)


def where(requests: Requests) -> dict[str, list[str]]:
    """Return the names in each container that is not empty."""
    containers = {
        name: getattr(requests, name)
        for name in ("receiving", "waiting", "loading", "prefilling", "decoding", "closing")
    }
    return {name: [one.spec.request_id for one in kept] for name, kept in containers.items() if len(kept)}


def test_a_request_is_in_the_container_of_its_status_and_in_no_other() -> None:
    requests = table()
    one = request("a", DecodeStatus.RESERVING)
    requests.add(one)
    places = [where(requests)]
    for status in (DecodeStatus.RECEIVING, DecodeStatus.RUNNING_DECODE, DecodeStatus.PREEMPTED, DecodeStatus.CLOSING):
        requests.move(one, status, 2.0)
        places.append(where(requests))
    assert places == [
        {"receiving": ["a"]},
        {"receiving": ["a"]},
        {"decoding": ["a"]},
        {"waiting": ["a"]},
        {"closing": ["a"]},
    ]
    assert [at_s for _, at_s in one.lifecycle.history] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_step_that_the_status_table_does_not_have_changes_nothing() -> None:
    requests = table()
    one = request("a", DecodeStatus.WAITING)
    requests.add(one)
    with pytest.raises(LocalProtocolError, match="waiting -> running_decode is not a legal step"):
        requests.move(one, DecodeStatus.RUNNING_DECODE, 2.0)
    assert one.status is DecodeStatus.WAITING
    assert where(requests) == {"waiting": ["a"]}


def test_a_request_that_has_ended_is_forgotten() -> None:
    requests = table()
    one, other = request("a", DecodeStatus.WAITING), request("b", DecodeStatus.WAITING)
    requests.add(one)
    requests.add(other)
    requests.move(one, DecodeStatus.CLOSING, 2.0)
    assert requests.open() == [other]
    assert requests.find(one.attempt) is one
    requests.move(one, DecodeStatus.ENDED, 2.0)
    assert requests.find(one.attempt) is None
    assert list(requests) == [other]


def test_a_prompt_leaves_the_prefill_order_when_its_request_is_over() -> None:
    requests = table()
    one = request("a", DecodeStatus.WAITING)
    requests.add(one)
    num_before = len(requests.order)
    requests.move(one, DecodeStatus.CLOSING, 2.0)
    assert (num_before, len(requests.order)) == (1, 0)


def test_a_set_keeps_the_order_of_joining_and_tells_who_joins() -> None:
    joined: list[DecodeRequest] = []
    requests: RequestSet[DecodeRequest] = RequestSet(joined.append)
    first, second = request("a", DecodeStatus.WAITING), request("b", DecodeStatus.WAITING)
    requests.add(second)
    requests.add(first)
    requests.remove(second)
    requests.add(second)
    assert list(requests) == [first, second]
    assert joined == [second, first, second]
