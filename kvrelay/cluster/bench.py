"""``kvrelay bench``: its options."""

from __future__ import annotations

import json
import math
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, assert_never

import typer

DEFAULT_PROMPTS = 100
DEFAULT_OUTPUT_TOKENS = 128


class LoadName(StrEnum):
    """Kinds of load."""

    RANDOM = "random"
    CHATS = "chats"
    SHAREGPT = "sharegpt"
    MOONCAKE = "mooncake"


class Api(StrEnum):
    """Endpoints that generate."""

    COMPLETIONS = "completions"
    CHAT = "chat"


def bench(
    words: Annotated[
        list[str], typer.Argument(metavar="URL", help="Base URL of an OpenAI-compatible server, with or without /v1.")
    ],
    load: Annotated[
        LoadName,
        typer.Option(help="random: prompts of random tokens; chats: several turns; sharegpt, mooncake: of --file."),
    ] = LoadName.RANDOM,
    file: Annotated[
        Path | None, typer.Option(help="The load's file: ShareGPT's JSON, or a trace's JSON lines.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts or chats to send; default: 100, or the whole trace.")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Mean tokens of a prompt, or of a user's message.")] = 1024,
    output_len: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens of an answer; default: 128, or the file's.")
    ] = None,
    range_ratio: Annotated[
        float, typer.Option(min=0, max=0.999, help="Lengths are uniform in mean * (1 +- this).")
    ] = 0.0,
    prefix_len: Annotated[int, typer.Option(min=0, help="Tokens at the beginning that all prompts share.")] = 0,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Turns of a chat; default: 3 for chats, 1 for sharegpt.")
    ] = None,
    pause: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Mean pause between turns.")] = 0.0,
    speedup: Annotated[float, typer.Option(min=0.001, help="Replay a trace this many times as fast.")] = 1.0,
    length_scale: Annotated[float, typer.Option(min=0.001, help="Multiply the lengths of a trace.")] = 1.0,
    api: Annotated[
        Api | None, typer.Option("--api", help="Endpoint; default: chat for several turns, else completions.")
    ] = None,
    request_rate: Annotated[float, typer.Option(min=0.0001, help="Prompts or chats per second; inf: all at once.")] = (
        math.inf
    ),
    burstiness: Annotated[
        float, typer.Option(min=0.001, help="Shape of the gamma distribution of gaps: 1 Poisson, below 1 bursts.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Maximum prompts or chats at once.")] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="SLO...", help="Limits in ms, such as ttft:500 tpot:50; also e2el."),
    ] = None,
    compare: Annotated[str | None, typer.Option(metavar="URL2", help="A second server, measured in turn.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; default: 1, with --compare 5.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name; default: the server's first.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Directory with the model's tokenizer.json.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Use token ids below this only.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of full length (kvrelay, vLLM, SGLang).")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, help="Default: the server's.")] = None,
    extra_body: Annotated[str | None, typer.Option(metavar="JSON", help="More fields of each request.")] = None,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before the measurement.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of prompts, lengths and arrivals; + 1 with each round.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Maximum time of a request.")] = 600.0,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw it (needs kvrelay[bench]).")] = None,
) -> None:
    """Send a load to a server and measure TTFT, TPOT, ITL, E2E latency, throughput and goodput.

    The API key is in KVRELAY_API_KEY or OPENAI_API_KEY. Exits with 1 if a request fails.
    """
    from kvrelay.bench.loads import Lengths, Load, MooncakeLoad, RandomLoad, ShareGPTLoad
    from kvrelay.bench.metrics import parse_goodput
    from kvrelay.bench.session import Settings, run_bench
    from kvrelay.cluster.terminal import PlainConsole

    lengths = Lengths(input_len, range_ratio), Lengths(output_len or DEFAULT_OUTPUT_TOKENS, range_ratio)
    num_turns = turns or (3 if load is LoadName.CHATS else 1)
    made: Load
    match load:
        case LoadName.RANDOM:
            num_turns = 1
            made = RandomLoad(num_prompts or DEFAULT_PROMPTS, *lengths, prefix_tokens=prefix_len)
        case LoadName.CHATS:
            made = RandomLoad(num_prompts or DEFAULT_PROMPTS, *lengths, num_turns, prefix_len, pause)
        case LoadName.SHAREGPT:
            made = ShareGPTLoad(_required(file), num_prompts or DEFAULT_PROMPTS, num_turns, output_len)
        case LoadName.MOONCAKE:
            num_turns = 1
            made = MooncakeLoad(_required(file), num_prompts, speedup, length_scale)
        case _:
            assert_never(load)
    if num_turns > 1 and api is Api.COMPLETIONS:
        raise typer.BadParameter("several turns need the endpoint chat", param_hint="--api")
    key = os.environ.get("KVRELAY_API_KEY") or os.environ.get("OPENAI_API_KEY")
    settings = Settings(
        urls=tuple(map(_base_url, [words[0], *([compare] if compare else [])])),
        load=made,
        api=(api or (Api.CHAT if num_turns > 1 else Api.COMPLETIONS)).value,
        model=model,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        num_warmups=num_warmups,
        rounds=rounds or (5 if compare else 1),
        seed=seed,
        goodput_ms=parse_goodput([*(goodput or []), *words[1:]]),
        fields=_fields(extra_body, ignore_eos=ignore_eos, temperature=temperature),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout_s=timeout,
        json_path=json_path,
        plot_path=plot,
    )
    raise typer.Exit(run_bench(settings, PlainConsole()))


def _base_url(text: str) -> str:
    return (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1")


def _required(file: Path | None) -> Path:
    if file is None:
        raise typer.BadParameter("this load needs the file that it is read from", param_hint="--file")
    return file


def _fields(extra_body: str | None, *, ignore_eos: bool, temperature: float | None) -> dict[str, Any]:
    """Return the fields that are added to each request."""
    try:
        fields = json.loads(extra_body or "{}")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--extra-body") from error
    if not isinstance(fields, dict):
        raise typer.BadParameter("should be a JSON object", param_hint="--extra-body")
    chosen: dict[str, Any] = {"ignore_eos": True} if ignore_eos else {}
    if temperature is not None:
        chosen["temperature"] = temperature
    return chosen | fields
