"""Phases of requests, from timelines as the router answers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from kvrelay.protocol.phases import NAMES, hidden_share, phases

MARKS = {
    "router": [("received", 0), ("dispatched", 1), ("first_token", 36), ("done", 117)],
    "p0": [("queued", 2), ("prefill", 3), ("reserved", 7), ("first_token", 32), ("hand_off", 32), ("transferred", 36)],
    "d2": [("reserved", 5), ("handed_off", 33), ("kv_arrived", 34), ("decode", 35), ("done", 116)],
}


def timeline(marks: Mapping[str, Sequence[tuple[str, float]]], *layers: tuple[float, float]) -> dict[str, Any]:
    return {
        "request_id": "cmpl-1",
        "marks": [{"name": name, "at_s": at, "node": node} for node, its in marks.items() for name, at in its],
        "layers": [
            {"layer": index, "first_sent_s": first, "last_written_s": last, "num_bytes": 10}
            for index, (first, last) in enumerate(layers)
        ],
    }


def test_phases_of_a_disaggregated_request() -> None:
    found = {(p.node, p.name): (p.start_s, p.end_s) for p in phases(timeline(MARKS, (22, 25), (34, 36)))}

    assert found == {
        ("router", "request"): (0, 117),
        ("router", "route"): (0, 1),
        ("router", "wait_first_token"): (1, 36),
        ("router", "stream"): (36, 117),
        ("p0", "queue"): (2, 3),
        ("p0", "prefill"): (3, 32),
        ("p0", "reserve"): (3, 7),
        ("p0", "send"): (32, 36),
        ("d2", "receive"): (5, 34),
        ("d2", "decode"): (35, 116),
        ("transfer", "transfer"): (22, 36),
    }
    assert {p.name for p in phases(timeline(MARKS))} <= set(NAMES)


def test_phases_of_a_mixed_node_that_preempts_and_reloads() -> None:
    marks = [("queued", 0), ("prefill", 1), ("decode", 4), ("preempted", 6), ("load", 9), ("loaded", 10)]
    marks += [("prefill", 10), ("decode", 11), ("done", 20)]
    found = [(p.name, p.start_s, p.end_s) for p in phases(timeline({"m0": marks}))]

    assert found == [
        ("queue", 0, 1),
        ("prefill", 1, 4),
        ("decode", 4, 6),
        ("preempted", 6, 9),
        ("reload", 9, 10),
        ("prefill", 10, 11),
        ("decode", 11, 20),
    ]


def test_a_phase_that_has_not_ended_is_none() -> None:
    assert phases(timeline({"p0": [("queued", 0)]})) == []
    assert [p.name for p in phases(timeline({"p0": [("queued", 0), ("prefill", 1)]}))] == ["queue"]


def test_attempts_on_one_node_are_phases_of_their_own() -> None:
    marks = [("queued", 0), ("prefill", 1), ("first_token", 2), ("queued", 5), ("prefill", 6), ("first_token", 8)]
    found = [(p.name, p.start_s, p.end_s) for p in phases(timeline({"p0": marks})) if p.name == "prefill"]

    assert found == [("prefill", 1, 2), ("prefill", 6, 8)]


def test_the_hidden_share_is_that_of_the_transfer_during_prefill() -> None:
    assert hidden_share(timeline(MARKS, (22, 25), (34, 42))) == pytest.approx(0.5)
    assert hidden_share(timeline(MARKS, (10, 30))) == 1.0
    assert hidden_share(timeline(MARKS)) is None
