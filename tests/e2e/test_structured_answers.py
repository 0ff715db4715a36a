"""Structured output over HTTP with a real model: valid, and the same on a mixed node and from P to D."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.asking import Asker, play
from support.cluster import Cluster, running
from support.cluster_config import cluster_config, d, m, p

MODEL = Path(__file__).parents[2] / "models" / "demo"
QUESTION = [
    {"role": "user", "content": "The red key lies in box 417. The blue lamp stands in room 9. Where is the red key?"}
]
SCHEMA = {
    "type": "object",
    "properties": {
        "thing": {"enum": ["red key", "blue lamp"]},
        "box": {"type": "integer", "minimum": 0, "maximum": 999},
        "near": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["thing", "box"],
    "additionalProperties": False,
}
WISHES: dict[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}},
    "sampled": {"guided_json": SCHEMA, "temperature": 1.0, "n": 3},
    "choice": {"structured_outputs": {"choice": ["The red key", "Noted.", "The blue lamp is in room 9."]}},
    "regex": {"guided_regex": "The (red|blue) key is in [a-z]+ [0-9]{3}[.]", "logprobs": True},
    "grammar": {"guided_grammar": 'root ::= "It lies in " ("box" | "room") " " [0-9] [0-9] "."'},
}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", params=["mixed", "1p1d"])
def answers(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Return the texts of all choices for each wish, streamed and not."""
    nodes = (m(),) if request.param == "mixed" else (p(), d(speculative={"method": "ngram"}))
    with running(cluster_config(MODEL, *nodes, cache={"num_blocks": 512})) as cluster:
        yield request.param, {name: texts(cluster, wish) for name, wish in WISHES.items()}
        cluster.wait_until_quiescent()


def texts(cluster: Cluster, wish: dict[str, Any]) -> list[str]:
    body = {"messages": QUESTION, "max_tokens": 500, "temperature": 0.0, "seed": 7, **wish}

    async def both(asker: Asker) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        whole = await asker.post("/v1/chat/completions", body)
        return whole.body, await asker.stream("/v1/chat/completions", body)

    whole, parts = play(cluster, both)
    assert all(choice["finish_reason"] == "stop" for choice in whole["choices"]), whole
    found = [choice["message"]["content"] for choice in whole["choices"]]
    streamed = [""] * len(found)
    for part in parts:
        for choice in part["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == found
    return found


FIRST: dict[str, dict[str, list[str]]] = {}


def test_answers_are_valid_and_the_same_everywhere(answers: tuple[str, dict[str, list[str]]]) -> None:
    _, found = answers
    for text in (*found["schema"], *found["sampled"]):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert json.loads(found["schema"][0])["thing"] in ("red key", "blue lamp")
    assert found["choice"][0] in WISHES["choice"]["structured_outputs"]["choice"]
    assert re.fullmatch(WISHES["regex"]["guided_regex"], found["regex"][0])
    assert re.fullmatch("It lies in (box|room) [0-9]{2}[.]", found["grammar"][0])
    assert FIRST.setdefault("answers", found) == found
