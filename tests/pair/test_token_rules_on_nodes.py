"""Allowed tokens and bad words on clusters in virtual time: kept whatever happens to a request, with the same tokens.

What may come next follows from the output tokens, so a node that gets a request with some of them goes on where another
stopped.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.schemas import END, VOCAB_SIZE, text_of
from support.token_rules import bad_words, broken_rule, few_tokens, strict_rules
from support.world import Client, World
from test_resuming import STORE, counted, preempt_often

from kvrelay.protocol.request import Grammar, GrammarKind
from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask
from kvrelay.tokenizer.plain import plain_tokens

ROOM = {"block_size": 4, "num_blocks": 400}
RULES = strict_rules(VOCAB_SIZE)
_plain = plain_tokens(VOCAB_SIZE)


def ids(text: str) -> list[int]:
    found: list[int] = _plain.encode(text).ids
    return found


def submit(world: World, count: int = 8, **sampling: Any) -> list[Client]:
    """Ask for outputs that keep the rules, greedy and sampled."""
    return [
        world.submit(
            3 + 4 * index, 40, ignore_eos=True, **{"temperature": float(index % 2), "token_rules": RULES, **sampling}
        )
        for index in range(count)
    ]


def check(clients: list[Client]) -> None:
    allowed, words = few_tokens(VOCAB_SIZE), bad_words(VOCAB_SIZE)
    for client in clients:
        assert len(client.token_ids) == 40, client.ended
        assert broken_rule(client.token_ids, allowed, words) is None


def test_disaggregated_and_mixed_give_the_same_tokens() -> None:
    outputs = []
    shapes: list[dict[str, Any]] = [{"prefill": 1, "decode": 1}, {"prefill": 0, "decode": 0, "mixed": 1}]
    for roles in shapes:
        with World(1, cache=ROOM, **roles) as world:
            clients = submit(world, num_logprobs=1)
            world.serve_all()
            check(clients)
        outputs.append([client.token_ids for client in clients])
    assert outputs[0] == outputs[1]


@pytest.mark.fault("F10")
def test_preempted_every_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    with World(2, cache=ROOM, storage=STORE) as world:
        clients = submit(world)
        world.serve_all()
        check(clients)
        assert counted(world, "preemptions") >= 10


def test_drafts_change_nothing() -> None:
    """So few tokens are left that drafts are often right, and often what must not come."""
    few = TokenRules(token_mask([5, 6], VOCAB_SIZE), BadWords.of([[5, 5, 5, 5], [6, 6, 6]]))
    with World(3, cache=ROOM, speculative={"method": "ngram", "num_speculative_tokens": 3}) as world:
        clients = submit(world, token_rules=few)
        world.serve_all()
        for client in clients:
            assert broken_rule(client.token_ids, [5, 6], [[5] * 4, [6] * 3]) is None
        assert counted(world, "accepted_draft_tokens") > 30


def test_the_decode_node_dies_in_mid_stream() -> None:
    with World(4, decode=2, cache=ROOM) as world:
        clients = submit(world, 12)
        running = [client for client in clients if client.nodes[-1] == "d0"]
        world.run_until(lambda: sum(len(client.token_ids) > 3 for client in running) > 2)
        world.kill("d0")
        world.serve_all()
        check(clients)


@pytest.mark.parametrize("drafts", ["none", "ngram"])
def test_a_grammar_and_rules_together(drafts: str) -> None:
    """Only what both allow comes: of the numbers those without 7, in which 12 is nowhere."""
    rules = TokenRules(token_mask([*ids("0123456789"), END], VOCAB_SIZE), BadWords.of([ids("7"), ids("12")]))
    with World(5, cache=ROOM, speculative={"method": drafts, "num_speculative_tokens": 3}) as world:
        clients = [
            world.submit(
                5 + index,
                60,
                eos_token_ids=[END],
                grammar=Grammar(GrammarKind.REGEX, "[0-9a-z]{25}"),
                token_rules=rules,
                temperature=float(index % 2),
            )
            for index in range(8)
        ]
        world.serve_all()
        for client in clients:
            text = text_of(client.token_ids)
            assert len(text) == 25 and text.isdigit()
            assert "7" not in text and "12" not in text


def test_a_request_that_leaves_no_token_fails_alone_as_an_invalid_one() -> None:
    """The grammar wants what the rules exclude; a node learns it where it happens."""
    with World(6, cache=ROOM) as world:
        letters = token_mask([*ids("abc"), END], VOCAB_SIZE)  # and no token of several letters
        excluded = TokenRules(letters, BadWords.of([ids("ab")]))
        stuck = world.submit(
            5, 20, eos_token_ids=[END], grammar=Grammar(GrammarKind.REGEX, "abc"), token_rules=excluded
        )
        clients = submit(world, 3)
        world.settle_clients()
        assert stuck.error == "invalid_request_error"
        assert stuck.token_ids == ids("a")
        check(clients)
