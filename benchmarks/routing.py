"""Routing policies: time to first token and prefix hits of a multi-turn load on 4 prefill and 4 decode nodes.

    python benchmarks/routing.py [--seeds 3] [--policies cache_aware least_loaded ...] [--baseline random]

The real state machines of router, nodes and messagers run in virtual time on a simulated network, so the result does
not depend on this machine. Steps take the time of an 8B model on a 40 GB accelerator (``support/cost_model.py``); pools
have 2,000 blocks, so that prefix caches evict. The load (``support/chats.py``): chats of 2 to 8 turns, 72 at once, each
turn with the whole history before it and 1 s after the answer on average; answers of 16 tokens. Chats of one group
begin with the same system prompt of 1,000 tokens; there are 4 groups of 30. Every policy gets the same chats and
chooses prefill and decode nodes. Ratios are to ``--baseline``: their median over the seeds, and their quartiles.
``late`` and ``early``: how much later and earlier than predicted first tokens came, divided by the number of all; only
for a policy that predicts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent / "support")]
from chats import chats  # type: ignore[import-not-found]  # of benchmarks/support, a name that the tests have too
from cost_model import BLOCK_SIZE, COSTS  # type: ignore[import-not-found]
from support.world import World

from kvrelay.config.sections import RoutingPolicy
from router.events import Deliver

NUM_GROUPS, CHATS_PER_GROUP, NUM_AT_ONCE, ANSWER_TOKENS, THINK_S = 4, 30, 72, 16, 1.0
NUM_BLOCKS = 2_000
MIN_FOR_QUARTILES = 4


@dataclass(frozen=True)
class Turn:
    """One request of a chat, and what the user says after it."""

    prompt: list[int]
    others: list[list[int]]
    session: str


@dataclass
class Result:
    """Times to first token in seconds, prompt tokens, those found in P's prefix cache, and the virtual duration.

    ``late_s`` and ``early_s``: how much later and earlier than predicted first tokens came, sums.
    """

    ttft_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    total_s: float = 0.0
    late_s: float = 0.0
    early_s: float = 0.0

    @property
    def mean_ms(self) -> float:
        return statistics.fmean(self.ttft_s) * 1e3

    def percentile_ms(self, percent: int) -> float:
        return statistics.quantiles(self.ttft_s, n=100)[percent - 1] * 1e3


class ChatWorld(World):
    """A cluster in virtual time whose clients hold chats."""

    def begin(self, seed: int) -> None:
        """Let the clients of ``seed`` begin."""
        self._choices = random.Random(seed)
        self._waiting = [chat for group in range(NUM_GROUPS) for chat in chats(1000 * seed + group)[:CHATS_PER_GROUP]]
        self._choices.shuffle(self._waiting)
        self._num_active = 0
        self._open: dict[str, Turn] = {}
        self.result = Result()
        for _ in range(NUM_AT_ONCE):
            self.after(self._choices.uniform(0.0, THINK_S), self._begin_chat)

    @property
    def is_over(self) -> bool:
        """Whether all chats have ended."""
        return not self._waiting and not self._num_active

    def _begin_chat(self) -> None:
        if self._waiting:
            self._num_active += 1
            first, *others = self._waiting.pop()
            self._ask(Turn(first, others, session=f"chat {len(self._waiting)}"))

    def _ask(self, turn: Turn) -> None:
        client = self.submit(turn.prompt, ANSWER_TOKENS, session=turn.session, eos_token_ids=[])
        self._open[client.request_id] = turn
        self.result.num_prompt_tokens += len(turn.prompt)

    def deliver(self, action: Deliver) -> None:
        """Measure the first token. After the last one, the user thinks and asks on, or another chat begins."""
        client = self.clients[action.request_id]
        is_first = not client.token_ids
        super().deliver(action)
        if is_first and client.token_ids:
            self.result.ttft_s.append(self.now - client.submitted_s)
            self.result.num_cached_tokens += client.num_cached_tokens
        if client.ended is None:
            return
        client.check()
        turn = self._open.pop(client.request_id)
        del self.clients[client.request_id]
        think_s = self._choices.expovariate(1 / THINK_S)
        if turn.others:
            history = turn.prompt + client.token_ids
            following = Turn(history + turn.others[0], turn.others[1:], turn.session)
            self.after(think_s, lambda: self._ask(following))
        else:
            self._num_active -= 1
            self.after(think_s, self._begin_chat)


def measure(policy: RoutingPolicy, seed: int) -> Result:
    with ChatWorld(
        seed,
        prefill=4,
        decode=4,
        router={"prefill_routing": policy, "decode_routing": policy},
        cache={"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS},
        scheduler={"max_num_batched_tokens": 2048, "max_num_seqs": 64},
        engine={**COSTS.model_dump(include={"step_s", "prefill_token_s", "decode_token_s", "context_token_s"})},
        transfer={"lease_s": 30.0, "timeout_s": 60.0},
    ) as world:
        began_s = world.now
        world.begin(seed)
        world.run_until(lambda: world.is_over, 10_000.0)
        world.result.total_s = world.now - began_s
        errors = world.router.machine.requests.prediction_errors
        world.result.late_s, world.result.early_s = errors["late"].total, errors["early"].total
        world.settle()
        return world.result


def report(results: dict[RoutingPolicy, list[Result]], baseline: RoutingPolicy) -> Table:
    table = Table(
        "policy",
        "mean TTFT ms",
        "P50",
        "P90",
        "P99",
        f"mean / {baseline}",
        "prompt tokens cached",
        "total s",
        "late ms",
        "early ms",
    )
    base = results.get(baseline)
    for policy, runs in results.items():
        ratios = [run.mean_ms / other.mean_ms for run, other in zip(runs, base or [], strict=False)]
        columns = [statistics.median(run.mean_ms for run in runs)]
        columns += [statistics.median(run.percentile_ms(percent) for run in runs) for percent in (50, 90, 99)]
        share = statistics.median(run.num_cached_tokens / run.num_prompt_tokens for run in runs)
        total = statistics.median(run.total_s for run in runs)
        ratio = _with_quartiles(ratios) if base is not runs else ""
        errors = [
            statistics.median(1e3 * seconds / len(run.ttft_s) for run, seconds in zip(runs, sums, strict=True))
            for sums in ([run.late_s for run in runs], [run.early_s for run in runs])
        ]
        shown = [f"{ms:,.0f}" for ms in errors] if any(errors) else ["", ""]
        table.add_row(policy, *(f"{ms:,.0f}" for ms in columns), ratio, f"{share:.0%}", f"{total:.0f}", *shown)
    return table


def _with_quartiles(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    median = f"{statistics.median(ratios):.2f}"
    if len(ratios) < MIN_FOR_QUARTILES:
        return median
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{median} ({low:.2f} to {high:.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    names = get_args(RoutingPolicy)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", nargs="+", choices=names, default=list(names))
    parser.add_argument("--baseline", choices=names, default="random")
    options = parser.parse_args(arguments)
    runs = [(policy, seed) for seed in range(options.seeds) for policy in options.policies]
    results: dict[RoutingPolicy, list[Result]] = {policy: [] for policy in options.policies}
    for policy, seed in track(runs, "running", console=Console(stderr=True)):
        results[policy].append(measure(policy, seed))
    Console(width=140).print(report(results, options.baseline))


if __name__ == "__main__":
    main()
