"""The ``kvrelay`` command. Exit codes: 0 success, 2 invalid usage or config, 1 any other error.

Every command imports its own modules, so that the router starts without Paddle and within a second.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import kvrelay
from kvrelay.cluster.bench import bench
from kvrelay.config.cluster_config import ClusterConfig, Role
from kvrelay.errors import (
    CheckpointError,
    ConfigError,
    KVRelayError,
)
from kvrelay.printable import printable

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_ADMIN_URL = "http://127.0.0.1:8090"
_ADDRESS = re.compile(r"https?://\S+|(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}(?:/v1)?/?")
"""Arguments of ``chat`` that are addresses and not text."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(no_args_is_help=True, help="Check a config, or print its schema.")
model_app = typer.Typer(no_args_is_help=True, help="Create checkpoints.")
keys_app = typer.Typer(no_args_is_help=True, help="Make the keys by which the processes know each other.")
store_app = typer.Typer(no_args_is_help=True, help="Inspect the KV store of a cluster, running or not.")
app.add_typer(config_app, name="config")
app.add_typer(model_app, name="model")
app.add_typer(keys_app, name="keys")
app.add_typer(store_app, name="store")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvrelay {kvrelay.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A cluster that serves language models with prefill and decode on different nodes."""


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The cluster's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key: router.port=8001, nodes.d0.cache.num_blocks=64."),
]
NodeName = Annotated[str, typer.Option("--node", metavar="NAME", help="Name of the node in CONFIG.")]

AdminURL = Annotated[
    str, typer.Option("--url", metavar="URL", help="The router's address for operators (router.admin_port).")
]
KeyFile = Annotated[
    str | None,
    typer.Option("--key-file", metavar="FILE", help="File with the operators' key; default: KVRELAY_ADMIN_KEY."),
]
WaitS = Annotated[float, typer.Option("--timeout", min=0, metavar="SECONDS", help="How long to wait for each node.")]

StoreOf = Annotated[
    str | None,
    typer.Option("--node", metavar="NAME", help="The node whose store is used, if nodes have different stores."),
]


class Arch(StrEnum):
    """Architectures of checkpoints with random weights."""

    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    LLAMA = "llama"
    MISTRAL = "mistral"
    ERNIE4_5 = "ernie4_5"


class Preset(StrEnum):
    """Sizes of checkpoints with random weights."""

    TINY = "tiny"
    QWEN2_05B = "qwen2-0.5b"


class ShapePreset(StrEnum):
    """Models whose shape ``model shape`` knows."""

    QWEN2_05B = "qwen2-0.5b"
    QWEN3_06B = "qwen3-0.6b"
    LLAMA3_8B = "llama3-8b"
    QWEN3_8B = "qwen3-8b"


class SchemaFormat(StrEnum):
    """Output formats of ``config schema``."""

    JSON = "json"
    MARKDOWN = "markdown"


def main() -> None:
    """Run the command and exit."""
    try:
        app()
    except (ConfigError, CheckpointError) as error:
        _complain(str(error))
        sys.exit(2)
    except KVRelayError as error:
        _complain(f"error: {error}")
        sys.exit(1)


def _complain(text: str) -> None:
    """Print an error, which may quote a file or a server."""
    print(printable(text, keep="\n\t"), file=sys.stderr)


def _say(text: str) -> None:
    """Print a line, which may quote a file or a server."""
    typer.echo(printable(text))


def _load(path: Path, overrides: list[str] | None) -> ClusterConfig:
    return ClusterConfig.load(path, overrides or [])


# ---------------------------------------------------------------- processes


@app.command()
def up(config: ConfigPath, overrides: Overrides = None) -> None:
    """Start all processes of a cluster on this host. Restart those that crash. Drain on Ctrl-C."""
    from kvrelay.cluster.process import name_process, refuse_foreign_packages, require_checkpoint
    from kvrelay.cluster.terminal import PlainConsole
    from kvrelay.cluster.up import up as run_cluster

    refuse_foreign_packages()
    cluster = _load(config, overrides)
    require_checkpoint(cluster.model)
    name_process("up", str(config))
    raise typer.Exit(asyncio.run(run_cluster(cluster, config, overrides or [], PlainConsole())))


@app.command()
def router(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the router."""
    from kvrelay.cluster.process import become, require_checkpoint

    cluster = _load(config, overrides)
    become("router", "router", cluster.cluster)
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
    """Run one mixed node, which prefills and decodes."""
    _run_node(Role.MIXED, config, node, overrides)


def _run_node(role: Role, path: Path, name: str, overrides: list[str] | None) -> None:
    from kvrelay.cluster.process import become, bind_to_cpus, require_checkpoint

    cluster = _load(path, overrides)
    node = cluster.node(name)
    if node.role is not role:
        raise ConfigError([f"node {name} is a {node.role} node: run it with kvrelay {node.role}"])
    become(role, name, node.cluster)
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
    url: Annotated[
        str, typer.Argument(metavar="[URL]", help="The router's address for operators, or that for clients.")
    ] = DEFAULT_ADMIN_URL,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    key_file: KeyFile = None,
) -> None:
    """Show the nodes, their load and the requests."""
    from kvrelay.admin_key import read_admin_key
    from kvrelay.cluster.talk import show_status

    show_status(_router_url(url), read_admin_key(key_file), watch=watch)


@app.command()
def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.")],
    url: AdminURL = DEFAULT_ADMIN_URL,
    stop: Annotated[bool, typer.Option("--stop", help="Keep it down: kvrelay up does not start it again.")] = False,
    timeout_s: WaitS = 600.0,
    key_file: KeyFile = None,
) -> None:
    """Let NODE finish its requests and end. kvrelay up starts it again."""
    from kvrelay.admin_key import read_admin_key
    from kvrelay.cluster import operate
    from kvrelay.cluster.client import ClusterClient

    with ClusterClient(_router_url(url), key=read_admin_key(key_file)) as cluster:
        operate.drain(cluster, node, stay_down=stop, timeout_s=timeout_s, say=_say)


@app.command()
def restart(
    nodes: Annotated[list[str] | None, typer.Argument(metavar="[NODE]...", help="Names of nodes.")] = None,
    rolling: Annotated[bool, typer.Option("--rolling", help="All nodes.")] = False,
    url: AdminURL = DEFAULT_ADMIN_URL,
    timeout_s: WaitS = 600.0,
    key_file: KeyFile = None,
) -> None:
    """Restart nodes of a kvrelay up, one after another: each drains, and the next follows when it is back."""
    from kvrelay.admin_key import read_admin_key
    from kvrelay.cluster import operate
    from kvrelay.cluster.client import ClusterClient

    if bool(nodes) is rolling:
        raise typer.BadParameter("name nodes, or give --rolling for all")
    with ClusterClient(_router_url(url), key=read_admin_key(key_file)) as cluster:
        operate.restart(cluster, nodes or [], timeout_s=timeout_s, say=_say)


@app.command()
def reset_prefix_cache(url: AdminURL = DEFAULT_ADMIN_URL, key_file: KeyFile = None) -> None:
    """Have all nodes forget the prompts in their KV caches."""
    from kvrelay.admin_key import read_admin_key
    from kvrelay.cluster import operate
    from kvrelay.cluster.client import ClusterClient

    with ClusterClient(_router_url(url), key=read_admin_key(key_file)) as cluster:
        operate.reset_prefix_cache(cluster, say=_say)


@app.command()
def cancel(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the answer, or the client's X-Request-Id.")],
    url: AdminURL = DEFAULT_ADMIN_URL,
    key_file: KeyFile = None,
) -> None:
    """Cancel a request in progress. Its client gets an error."""
    from kvrelay.admin_key import read_admin_key
    from kvrelay.cluster import operate
    from kvrelay.cluster.client import ClusterClient

    with ClusterClient(_router_url(url), key=read_admin_key(key_file)) as cluster:
        operate.cancel(cluster, request_id, say=_say)


@app.command()
def dump(
    name: Annotated[str, typer.Argument(metavar="NODE", help="Name of a node; or router.")],
    url: AdminURL = DEFAULT_ADMIN_URL,
    prompts: Annotated[
        bool, typer.Option("--with-prompts", help="Write prompts and outputs too; only then it can be replayed.")
    ] = False,
    key_file: KeyFile = None,
) -> None:
    """Have NODE and its messager, or the router, write their last events to files on their host."""
    from kvrelay.admin_key import read_admin_key
    from kvrelay.cluster import operate
    from kvrelay.cluster.client import ClusterClient

    with ClusterClient(_router_url(url), key=read_admin_key(key_file)) as cluster:
        operate.dump(cluster, name, prompts=prompts, say=_say)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of kvrelay dump, or of a crash.")],
    show: Annotated[bool, typer.Option("--show", help="Print the events; replay nothing.")] = False,
) -> None:
    """Feed the events in FILE to the same machine. Exit with 1 if it does something else, 2 if that cannot be done."""
    from kvrelay.cluster import replay as recordings

    if show:
        recordings.show(file, _say)
    elif not recordings.replay(file, _say):
        raise typer.Exit(1)


@app.command()
def chat(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[URL] [TEXT]", help="Address of the router, and the message.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer, in tokens.")] = 256,
) -> None:
    """Send TEXT to the model and stream its answer. Without TEXT: a conversation.

    If the router has API keys, set KVRELAY_API_KEY to one.
    """
    from kvrelay.cluster.talk import converse, say

    words, key = words or [], os.environ.get("KVRELAY_API_KEY")
    url = _router_url(words.pop(0) if words and _ADDRESS.fullmatch(words[0]) else DEFAULT_URL)
    if words:
        say(url, " ".join(words), max_tokens, key=key)
    elif sys.stdin.isatty():
        converse(url, max_tokens, key=key)
    else:
        say(url, sys.stdin.read(), max_tokens, key=key)


@app.command()
def trace(
    request_id: Annotated[
        str | None, typer.Argument(metavar="[REQUEST_ID]", help="One request; default: the newest ones.")
    ] = None,
    url: AdminURL = DEFAULT_ADMIN_URL,
    count: Annotated[int, typer.Option("--last", "-n", min=1, max=256, help="How many of the newest requests.")] = 50,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The trace.")] = Path("trace.json"),
    key_file: KeyFile = None,
) -> None:
    """Write a trace of requests across all processes; open it at ui.perfetto.dev or chrome://tracing."""
    from kvrelay.admin_key import read_admin_key
    from kvrelay.cluster.client import ClusterClient
    from kvrelay.cluster.trace import write_trace

    with ClusterClient(_router_url(url), key=read_admin_key(key_file)) as cluster:
        written = write_trace(cluster, output, request_id, count)
    typer.echo(f"{output}: {written} requests; open it at https://ui.perfetto.dev")


app.command()(bench)


# ---------------------------------------------------------------- configs and models


@config_app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check CONFIG. Print every problem with file and line, and exit with 2 if there is one."""
    cluster = _load(config, overrides)
    for warning in cluster.warnings:
        typer.echo(f"warning: {warning}", err=True)
    counts = Counter(node.role.value for node in cluster.nodes)
    typer.echo(f"{config}: OK: " + ", ".join(f"{count} {role}" for role, count in sorted(counts.items())))


@config_app.command()
def schema(
    form: Annotated[
        SchemaFormat, typer.Option("--format", help="json: JSON schema; markdown: the configuration reference.")
    ] = SchemaFormat.JSON,
) -> None:
    """Print the schema of a config."""
    if form is SchemaFormat.JSON:
        typer.echo(json.dumps(ClusterConfig.model_json_schema(), indent=2))
        return
    from kvrelay.cluster.config_reference import markdown

    typer.echo(markdown(), nl=False)


@model_app.command()
def tiny(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for the checkpoint.")],
    arch: Annotated[Arch | None, typer.Option(help="Architecture.", show_default="qwen3, or the preset's")] = None,
    preset: Annotated[
        Preset, typer.Option(help="Size; qwen2-0.5b: 365 M parameters in bf16, for benchmarks.")
    ] = Preset.TINY,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Create a checkpoint with random weights. Its output is meaningless."""
    from kvrelay.engine.tiny import write_tiny_checkpoint

    chosen = arch or (Arch.QWEN3 if preset is Preset.TINY else Arch.QWEN2)
    write_tiny_checkpoint(directory, chosen.value, seed, preset=preset.value)
    typer.echo(f"{directory}: {preset.value} {chosen.value} checkpoint with random weights")


@model_app.command()
def shape(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where config.json and the tokenizer go.")],
    preset: Annotated[ShapePreset, typer.Option(help="Which model's shape.")],
) -> None:
    """Make a model without weights, for model.load_format: dummy, which fills it at random on the device."""
    from kvrelay.engine.presets import write_shape

    write_shape(directory, preset.value)
    typer.echo(f"{directory}: the shape of {preset.value}; serve it with model.load_format: dummy")


# ---------------------------------------------------------------- keys


@keys_app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for the keys.")],
    config: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Make a key pair for the router and for each node of CONFIG. Existing keys are kept."""
    from kvrelay.runtime.keys import make_keys

    made = make_keys(directory, ["router", *(node.name for node in _load(config, overrides).nodes)])
    what = f"new keys for {', '.join(made)}" if made else "all keys exist already, none was made"
    typer.echo(f"{directory}: {what}; secret/NAME.key is for NAME's host only")


# ---------------------------------------------------------------- the KV store


@store_app.command()
def stats(config: ConfigPath, node: StoreOf = None, overrides: Overrides = None) -> None:
    """Show the number of blocks, tokens and bytes of the model in the store."""
    from kvrelay.cluster.store import show_stats
    from kvrelay.cluster.terminal import PlainConsole

    show_stats(_load(config, overrides), node, PlainConsole())


@store_app.command()
def clear(
    config: ConfigPath,
    node: StoreOf = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    overrides: Overrides = None,
) -> None:
    """Delete all KV of the model from the store."""
    from kvrelay.cluster import store
    from kvrelay.cluster.terminal import PlainConsole

    cluster = _load(config, overrides)
    sections = store.store_sections(cluster, node)
    if not yes:
        typer.confirm(f"Delete all KV of {sections.model.name} from the {sections.storage.backend} store?", abort=True)
    store.clear(cluster, node, PlainConsole())


@store_app.command()
def verify(config: ConfigPath, node: StoreOf = None, overrides: Overrides = None) -> None:
    """Read all KV of the model in the store and delete corrupt blocks. Exit with 1 if there was one."""
    from kvrelay.cluster import store
    from kvrelay.cluster.terminal import PlainConsole

    if not store.verify(_load(config, overrides), node, PlainConsole()):
        raise typer.Exit(1)
