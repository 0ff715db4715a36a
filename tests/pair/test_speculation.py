"""The mixed node's machine with the real engine: guessing ahead changes how many steps it takes, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.engine.interface import Engine
from kvrelay.engine.load import load_engine
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.machine.contract import CoreEvent, Received, RunStep, Send, Started, StepDone
from kvrelay.protocol.ids import ROUTER, NodeId, RequestId
from kvrelay.protocol.messages.node_to_router import Register, TokensOut
from kvrelay.protocol.messages.router_to_node import Generate
from kvrelay.protocol.request import RequestSpec, SamplingParams
from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask

FEW_TOKENS = dict.fromkeys((40, 41, 42), 200.0)
"""A bias that leaves the model three tokens to choose from, so that its text repeats itself."""

RULES: dict[str, Any] = {"token_rules": TokenRules(token_mask([40, 41], 384), BadWords.of([[40] * 4, [41] * 3]))}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speculation") / "tiny"
    write_tiny_checkpoint(path, "qwen2")
    return path


@dataclass
class Served:
    """What came out of one run."""

    num_steps: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)


def serve(engine: Engine, node: NodeConfig, requests: list[RequestSpec]) -> Served:
    """Run ``requests`` to their ends on a machine of their own."""
    registration = Register(
        node_id=NodeId(node.name),
        incarnation="1",
        role=node.role,
        address=node.address,
        pid=1,
        model="m",
        max_model_len=engine.max_model_len,
        max_num_seqs=node.scheduler.max_num_seqs,
        num_blocks=node.cache.fixed_num_blocks,
        geometry=engine.geometry,
        vocab_size=engine.vocab_size,
    )
    machine, served = DecodeMachine(node, registration), Served()
    events: list[CoreEvent] = [Started()]
    events += [Received(ROUTER, Generate(request=request)) for request in requests]
    while events:
        for action in machine.handle(events.pop(0), 0.0):
            match action:
                case RunStep(plan=plan):
                    served.num_steps += 1
                    events.append(StepDone(engine.run(plan, lambda layers: None)))
                case Send(message=TokensOut(outputs=outputs)):
                    for output in outputs:
                        served.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                        found = served.logprobs.setdefault(output.request_id, [])
                        found.extend(entry.logprob for entry in output.logprobs)
    machine.assert_quiescent()
    served.counters = machine.load().counters
    return served


def run(model_dir: Path, method: str, **sampling: Any) -> Served:
    """Serve four requests with speculation by ``method``."""
    node = NodeConfig.model_validate(
        {
            "name": "m0",
            "role": "mixed",
            "port": 1,
            "model": {"path": str(model_dir)},
            "cache": {"num_blocks": 64, "prefix_caching": False},
            "speculative": {"method": method, "num_speculative_tokens": 4},
        }
    )
    engine = load_engine(node, lambda done, total: None)
    prompts = [[7 * number + place for place in range(5 + 9 * number)] for number in range(4)]
    params = {"max_tokens": 40, "seed": 3, "temperature": 0.0, "num_logprobs": 2, "logit_bias": FEW_TOKENS, **sampling}
    requests = [
        RequestSpec(
            request_id=RequestId(f"r{number}"), epoch=1, prompt_token_ids=prompt, sampling=SamplingParams(**params)
        )
        for number, prompt in enumerate(prompts)
    ]
    try:
        return serve(engine, node, requests)
    finally:
        engine.close()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"presence_penalty": 0.5, "min_tokens": 9}, RULES])
def test_naive_and_ngram_give_the_tokens_and_logprobs_of_plain_steps(model_dir: Path, sampling: dict[str, Any]) -> None:
    plain, naive, ngram = (run(model_dir, method, **sampling) for method in ("none", "naive", "ngram"))
    assert plain.counters["draft_tokens"] == naive.counters["draft_tokens"] == 0
    assert naive.num_steps == plain.num_steps
    for other in (naive, ngram):
        assert other.tokens == plain.tokens
        for request_id, expected in plain.logprobs.items():
            assert other.logprobs[request_id] == pytest.approx(expected, abs=1e-4)


def test_ngram_needs_fewer_steps_for_text_that_repeats_itself(model_dir: Path) -> None:
    plain, ngram = run(model_dir, "none"), run(model_dir, "ngram")
    assert ngram.num_steps < plain.num_steps
    assert 0 < ngram.counters["accepted_draft_tokens"] <= ngram.counters["draft_tokens"]
