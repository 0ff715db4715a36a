"""The ``kvrelay`` command. Exit codes: 0 fine, 2 bad usage or config, 1 anything else.

Every verb imports what it needs itself, so that the command, and a router, start without Paddle and within a second.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvrelay.config.cluster_config import ClusterConfig, Role
from kvrelay.errors import (
    CheckpointError,
    ConfigError,
    KVRelayError,
)
from kvrelay.protocol.ids import NodeId

DEFAULT_URL = "http://127.0.0.1:8000"
_ADDRESS = re.compile(r"https?://\S+|(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}(?:/v1)?/?")
"""What of the words of ``chat`` is an address and no text."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A cluster that serves language models with prefill and decode on different nodes.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check configs and describe them.")
model_app = typer.Typer(no_args_is_help=True, help="Make checkpoints.")
store_app = typer.Typer(no_args_is_help=True, help="Look into the KV store of a cluster, whether that runs or not.")
app.add_typer(config_app, name="config")
app.add_typer(model_app, name="model")
app.add_typer(store_app, name="store")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The cluster's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key: router.port=8001, nodes.d0.cache.num_blocks=64."),
]
NodeName = Annotated[str, typer.Option("--node", metavar="NAME", help="The node to run, by its name in CONFIG.")]

StoreOf = Annotated[
    str | None,
    typer.Option("--node", metavar="NAME", help="Whose store, if the nodes have different ones."),
]


class Arch(StrEnum):
    """Architectures a tiny checkpoint can have."""

    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    LLAMA = "llama"
    MISTRAL = "mistral"
    ERNIE4_5 = "ernie4_5"


class Preset(StrEnum):
    """Sizes a checkpoint with random weights can have."""

    TINY = "tiny"
    QWEN2_05B = "qwen2-0.5b"


class ShapePreset(StrEnum):
    """Models whose shape ``model shape`` knows."""

    QWEN2_05B = "qwen2-0.5b"
    QWEN3_06B = "qwen3-0.6b"
    LLAMA3_8B = "llama3-8b"
    QWEN3_8B = "qwen3-8b"


class SchemaFormat(StrEnum):
    """Forms of ``config schema``."""

    JSON = "json"
    MARKDOWN = "markdown"


def main() -> None:
    """Run the command and exit."""
    try:
        app()
    except (ConfigError, CheckpointError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KVRelayError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _load(path: Path, overrides: list[str] | None) -> ClusterConfig:
    return ClusterConfig.load(path, overrides or [])


# ---------------------------------------------------------------- processes


@app.command()
def up(config: ConfigPath, overrides: Overrides = None) -> None:
    """Start all processes of a cluster on this host, restart what crashes, drain on Ctrl-C."""
    from rich.console import Console

    from kvrelay.cluster.process import name_process, refuse_foreign_packages, require_checkpoint
    from kvrelay.cluster.up import up as run_cluster

    refuse_foreign_packages()
    cluster = _load(config, overrides)
    require_checkpoint(cluster.model)
    name_process("up", str(config))
    raise typer.Exit(asyncio.run(run_cluster(cluster, config, overrides or [], Console())))


@app.command()
def router(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the router: HTTP for clients, the control address for nodes."""
    from kvrelay.cluster.process import become, require_checkpoint

    cluster = _load(config, overrides)
    become("router", "router", cluster.cluster.log_level)
    require_checkpoint(cluster.model)
    from router.__main__ import run

    raise typer.Exit(run(cluster))


@app.command()
def prefill(config: ConfigPath, node: NodeName, overrides: Overrides = None) -> None:
    """Run one prefill node."""
    _run_node(Role.PREFILL, config, node, overrides)


@app.command()
def decode(config: ConfigPath, node: NodeName, overrides: Overrides = None) -> None:
    """Run one decode node."""
    _run_node(Role.DECODE, config, node, overrides)


@app.command()
def mixed(config: ConfigPath, node: NodeName, overrides: Overrides = None) -> None:
    """Run one node that prefills and decodes, alone."""
    _run_node(Role.MIXED, config, node, overrides)


def _run_node(role: Role, path: Path, name: NodeId, overrides: list[str] | None) -> None:
    from kvrelay.cluster.process import become, bind_to_cpus, require_checkpoint

    cluster = _load(path, overrides)
    node = cluster.node(name)
    if node.role is not role:
        raise ConfigError([f"node {name} is a {node.role} node: kvrelay {node.role} runs it"])
    become(role, name, node.cluster.log_level)
    bind_to_cpus(node)
    if node.engine.kind != "fake":
        require_checkpoint(node.model)
    if role is Role.PREFILL:
        from prefill_node.__main__ import run
    else:
        from decode_node.__main__ import run
    raise typer.Exit(run(cluster, name))


# ---------------------------------------------------------------- talking to a cluster


def _router_url(text: str) -> str:
    """Return the base URL of the router that ``text`` means: a URL, with or without ``/v1``, or ``HOST:PORT``."""
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"should be http://HOST:PORT, not {text!r}", param_hint="URL")
    return url


@app.command()
def status(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Where the router is.")] = DEFAULT_URL,
    watch: Annotated[bool, typer.Option("--watch", help="Keep the picture up to date until Ctrl-C.")] = False,
) -> None:
    """Show the nodes, their load and the requests."""
    from kvrelay.cluster.talk import show_status

    show_status(_router_url(url), watch=watch)


@app.command()
def chat(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[URL] [TEXT]", help="Where the router is, and what to say.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Say TEXT to the model and stream its answer; without TEXT, hold a conversation."""
    from kvrelay.cluster.talk import converse, say

    words = words or []
    url = _router_url(words.pop(0) if words and _ADDRESS.fullmatch(words[0]) else DEFAULT_URL)
    if words:
        say(url, " ".join(words), max_tokens)
    elif sys.stdin.isatty():
        converse(url, max_tokens)
    else:
        say(url, sys.stdin.read(), max_tokens)


# ---------------------------------------------------------------- configs and models


@config_app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Tell whether CONFIG is right; if not, list everything that is wrong, with file and line."""
    cluster = _load(config, overrides)
    counts = Counter(node.role.value for node in cluster.nodes)
    typer.echo(f"{config}: OK: " + ", ".join(f"{count} {role}" for role, count in sorted(counts.items())))


@config_app.command()
def schema(
    form: Annotated[SchemaFormat, typer.Option("--format", help="For editors, or for people.")] = SchemaFormat.JSON,
) -> None:
    """Print the schema of a config: as JSON schema, or as the configuration reference."""
    if form is SchemaFormat.JSON:
        typer.echo(json.dumps(ClusterConfig.model_json_schema(), indent=2))
        return
    from kvrelay.cluster.config_reference import markdown

    typer.echo(markdown(), nl=False)


@model_app.command()
def tiny(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the checkpoint goes.")],
    arch: Annotated[Arch | None, typer.Option(help="Its architecture.", show_default="qwen3, or the preset's")] = None,
    preset: Annotated[
        Preset, typer.Option(help="Its size; qwen2-0.5b: 365 M parameters in bf16, to measure with.")
    ] = Preset.TINY,
    seed: Annotated[int, typer.Option(help="Its random weights.")] = 0,
) -> None:
    """Make a checkpoint with random weights: its output is meaningless."""
    from kvrelay.engine.tiny import write_tiny_checkpoint

    chosen = arch or (Arch.QWEN3 if preset is Preset.TINY else Arch.QWEN2)
    write_tiny_checkpoint(directory, chosen.value, seed, preset=preset.value)
    typer.echo(f"{directory}: a {preset.value} {chosen.value} with random weights")


@model_app.command()
def shape(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where config.json and the tokenizer go.")],
    preset: Annotated[ShapePreset, typer.Option(help="Which model's shape.")],
) -> None:
    """Make a model without weights, for model.load_format: dummy, which fills it at random on the device."""
    from kvrelay.engine.presets import write_shape

    write_shape(directory, preset.value)
    typer.echo(f"{directory}: the shape of {preset.value}; serve it with model.load_format: dummy")


# ---------------------------------------------------------------- the KV store


@store_app.command()
def stats(config: ConfigPath, node: StoreOf = None, overrides: Overrides = None) -> None:
    """Show how much KV of the model the store holds."""
    from rich.console import Console

    from kvrelay.cluster.store import show_stats

    show_stats(_load(config, overrides), node, Console())


@store_app.command()
def clear(
    config: ConfigPath,
    node: StoreOf = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    overrides: Overrides = None,
) -> None:
    """Drop all KV of the model from the store."""
    from rich.console import Console

    from kvrelay.cluster import store

    cluster = _load(config, overrides)
    sections = store.store_sections(cluster, node)
    if not yes:
        typer.confirm(f"Drop all KV of {sections.model.name} from the {sections.storage.backend} store?", abort=True)
    store.clear(cluster, node, Console())


@store_app.command()
def verify(config: ConfigPath, node: StoreOf = None, overrides: Overrides = None) -> None:
    """Read all KV of the model in the store and drop what is corrupt; exit with 1 if anything was."""
    from rich.console import Console

    from kvrelay.cluster import store

    if not store.verify(_load(config, overrides), node, Console()):
        raise typer.Exit(1)
