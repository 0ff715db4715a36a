"""A whole benchmark: asks the servers, sends the load in rounds, prints and writes the result."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvrelay.bench import plot, report, server
from kvrelay.bench.arrivals import arrival_times
from kvrelay.bench.compare import compare
from kvrelay.bench.errors import BenchError
from kvrelay.bench.http import Client
from kvrelay.bench.loads import Conversation, Load
from kvrelay.bench.metrics import Metrics, measure
from kvrelay.bench.prompts import (
    PromptMaker,
    TokenIdPrompts,
    TokenizedTextPrompts,
    WordPrompts,
    plain_token_ids,
    read_tokenizer,
)
from kvrelay.bench.runner import COMPLETIONS, Run, Runner, Target
from kvrelay.bench.streams import RequestRecord


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of ``kvrelay bench``; rates are per second, limits in milliseconds."""

    urls: tuple[str, ...]
    load: Load
    api: str = COMPLETIONS
    model: str | None = None
    tokenizer: Path | None = None
    vocab_size: int | None = None
    rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 1
    rounds: int = 1
    seed: int = 0
    goodput_ms: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    json_path: Path | None = None
    plot_path: Path | None = None


@dataclass(slots=True)
class _Server:
    """A server under test, and its runs."""

    client: Client
    target: Target
    card: dict[str, Any]
    is_kvrelay: bool
    runs: list[Run] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    phases: list[Metrics] = field(default_factory=list)


class Session:
    """One call of ``kvrelay bench``."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console

    async def run(self) -> int:
        """Run it; return the exit code: 1 if a request failed. Raises BenchError if there is nothing to measure."""
        settings = self._settings
        if settings.plot_path is not None:
            plot.require_matplotlib()  # not only when the measurements are done
        servers = [await self._open(url) for url in settings.urls]
        try:
            maker = await self._prompt_maker(servers[0])
            for number in range(settings.rounds):
                conversations = settings.load.conversations(maker, settings.seed + number)
                if number == 0:
                    await self._warm_up(servers, conversations, maker)
                order = servers if number % 2 == 0 else servers[::-1]
                for under_test in order:
                    await self._measure(under_test, conversations, settings.seed + number)
        finally:
            for under_test in servers:
                under_test.client.close()
        self._report(servers)
        return 1 if any(metrics["failed"] for under_test in servers for metrics in under_test.metrics) else 0

    async def _open(self, url: str) -> _Server:
        settings = self._settings
        client = Client(url, settings.headers)
        card = await server.model_card(client, settings.model)
        target = Target(str(card["id"]), settings.api, settings.fields, settings.timeout_s)
        return _Server(client, target, card, await server.is_kvrelay(client))

    async def _prompt_maker(self, under_test: _Server) -> PromptMaker:
        """Return what makes prompts: token ids if possible, else texts of a known tokenizer, else words."""
        settings = self._settings
        path = settings.tokenizer or server.local_tokenizer(under_test.card)
        if path is not None:
            tokenizer = read_tokenizer(path)
            token_ids = plain_token_ids(tokenizer, settings.vocab_size)
            if settings.api == COMPLETIONS and settings.load.takes_token_ids:
                return TokenIdPrompts(token_ids)
            return TokenizedTextPrompts(tokenizer, token_ids)
        if settings.vocab_size is not None and settings.api == COMPLETIONS and settings.load.takes_token_ids:
            return TokenIdPrompts(range(settings.vocab_size))
        self._say("no tokenizer given: prompts are invented words, and their lengths approximate")
        return WordPrompts(await server.tokens_per_word(under_test.client, under_test.target))

    async def _warm_up(
        self, servers: Sequence[_Server], conversations: Sequence[Conversation], maker: PromptMaker
    ) -> None:
        """Send each server a request of the load's size whose prompt is in no round."""
        turn = conversations[0].turns[0]
        for number in range(self._settings.num_warmups):
            content = maker.part(("warm-up", number), turn.num_tokens)
            for under_test in servers:
                await server.first_request(under_test.client, under_test.target, replace(turn, content=content))

    async def _measure(self, under_test: _Server, conversations: Sequence[Conversation], seed: int) -> None:
        settings = self._settings
        starts_s = self._starts(conversations, seed)
        runner = Runner(under_test.client, under_test.target, settings.max_concurrency)
        num_requests = sum(len(conversation.turns) for conversation in conversations)
        with self._progress(under_test.client.url, num_requests) as on_done:
            run = await runner.run(conversations, starts_s, on_done)
        under_test.runs.append(run)
        under_test.metrics.append(measure(run, settings.goodput_ms))
        if under_test.is_kvrelay:
            under_test.phases.append(await server.phase_metrics(under_test.client, run.records))

    def _starts(self, conversations: Sequence[Conversation], seed: int) -> list[float]:
        """Return when conversations begin: when the load says, unless a rate was given, or by the rate."""
        own = [conversation.start_s for conversation in conversations]
        if math.isinf(self._settings.rate) and None not in own:
            return [start_s for start_s in own if start_s is not None]
        return arrival_times(len(conversations), self._settings.rate, self._settings.burstiness, seed)

    # ------------------------------------------------------------ output

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, style="yellow")

    @contextmanager
    def _progress(self, url: str, total: int) -> Iterator[Any]:
        """Show a bar while requests are sent; yields what is called with each that has ended."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        failed = 0
        with Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True) as progress:
            task = progress.add_task(url, total=total)

            def on_done(record: RequestRecord) -> None:
                nonlocal failed
                failed += record.error is not None
                progress.update(task, advance=1, description=f"{url} ({failed} failed)" if failed else url)

            yield on_done

    def _report(self, servers: Sequence[_Server]) -> None:
        settings = self._settings
        for under_test in servers:
            for run, metrics in zip(under_test.runs, under_test.metrics, strict=True):
                self._show(under_test, run, metrics)
            if under_test.phases:
                self._console.print(report.phases_table(under_test.phases[-1]))
        ratios = {}
        if len(servers) == 2:
            ratios = compare(list(zip(servers[0].metrics, servers[1].metrics, strict=True)))
            self._console.print(report.ratios_table(ratios))
        if settings.json_path is not None:
            _write(settings.json_path, json.dumps(self._data(servers, ratios)) + "\n")
        if settings.plot_path is not None:
            plot.draw(
                settings.plot_path,
                {under_test.client.url: under_test.runs[-1].records for under_test in servers},
            )

    def _show(self, under_test: _Server, run: Run, metrics: Metrics) -> None:
        self._console.print(f"{under_test.client.url} {under_test.target.model}", style="bold", highlight=False)
        self._console.print(report.totals_table(metrics))
        self._console.print(report.latencies_table(metrics))
        for line in report.errors(run):
            self._console.print(line, style="red", highlight=False)
        if any(record.error is None and not record.has_usage for record in run.records):
            self._say("the server reports no usage: output tokens are numbers of chunks")
        self._console.print()

    def _data(self, servers: Sequence[_Server], ratios: Mapping[str, Any]) -> dict[str, Any]:
        def data_of(under_test: _Server) -> dict[str, Any]:
            phases: Sequence[Metrics] = under_test.phases or [{}] * len(under_test.runs)
            rounds = [report.as_data(*parts) for parts in zip(under_test.runs, under_test.metrics, phases, strict=True)]
            return {"url": under_test.client.url, "model_id": under_test.target.model, "rounds": rounds}

        settings = self._settings
        rate: float | str = "inf" if math.isinf(settings.rate) else settings.rate
        return {
            "load": {"kind": type(settings.load).__name__, **_plain(settings.load)},
            "api": settings.api,
            "request_rate": rate,
            "burstiness": settings.burstiness,
            "max_concurrency": settings.max_concurrency,
            "seed": settings.seed,
            "servers": [data_of(under_test) for under_test in servers],
            "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
        }


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise BenchError(f"--json {path}: {error}") from error


def _plain(load: Load) -> dict[str, Any]:
    """Return the load's settings as JSON data."""
    return {name: str(getattr(load, name)) for name in load.__dataclass_fields__}


def run_bench(settings: Settings, console: Console) -> int:
    """Run a benchmark; return the exit code. Raises BenchError."""
    import uvloop  # noqa: PLC0415 (a third faster)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Session(settings, console).run())
