"""Everything that reads what others wrote: messages, files, values in Redis, bodies, answers. Each with its examples.

A decoder returns or raises one of its ``refusals``. Anything else is a bug: another exception, one that was logged, too
much time or memory.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np

from cache_messager.mover import BlockMover
from cache_messager.settings import MessagerSettings
from cache_messager.work import AcceptLink, LinkReady
from kvrelay.bench.errors import BenchError
from kvrelay.bench.http import Answer, _Connection
from kvrelay.bench.loads import MooncakeLoad, ShareGPTLoad
from kvrelay.bench.prompts import WordPrompts
from kvrelay.bench.streams import _message, _StreamReader
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.config.sections import RouterConfig
from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.decoder_config import DecoderConfig, read_decoder_config, read_eos_token_ids
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.errors import (
    CheckpointError,
    ConfigError,
    KVRelayError,
    PreparationError,
    RemoteProtocolError,
    StorageError,
)
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.machine.clock import Clock
from kvrelay.node.metrics_server import MetricsServer
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.messager_to_messager import LinkOffer
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.registry.node_entry import NodeEntry, pack_entry, unpack_entry
from kvrelay.runtime.keys import Keys, make_keys
from kvstore.storage.block_format import BlockFormat
from kvstore.storage.file_store import FileBackend
from kvstore.storage.store import Store
from router.http.api_keys import parse_api_keys
from router.model import load_model
from router.openai.errors import AnswerError
from router.preparation import Job, Preparation, Task
from router.preparation_wire import Generate, Reply, decode_job, decode_prompt, decode_reply
from router.preparation_wire import encode as encode_wire
from support.messages import EXAMPLES
from support.mutations import JSON, MSGPACK, Notation

MAX_CPU_S = 2.0
"""CPU time that one input may take: of tens of kilobytes, on a slow machine."""

MAX_GROWTH_BYTES = 1 << 30
"""Memory that one input may take beyond what the process has. With more, an allocation fails."""

GEOMETRY = KVGeometry(3, 2, 4, 2, "float16", "model digest")
JSON_WORDS = (
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"1" * 5000,
    b'"\\ud800"',
    b"\xef\xbb\xbf",
    b"\xff",
    b"[[",
    b"{}",
)


@dataclass(frozen=True)
class Decoder:
    """``read`` takes one input. ``notation``: what the examples are written in. ``words``: bits of its language."""

    name: str
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    examples: Sequence[bytes]
    notation: Notation | None = None
    words: Sequence[bytes] = ()


class DecoderError(AssertionError):
    """A decoder did what it must not. ``kind`` is equal for inputs that show the same."""

    def __init__(self, decoder: Decoder, data: bytes, what: str, place: str = "") -> None:
        super().__init__(f"{decoder.name}: {what} {place}\n{data[:2000]!r}")
        self.kind = f"{decoder.name}: {what.partition(':')[0]} {place}"
        self.data = data


class _Logged(logging.Handler):
    """Keeps exceptions that were logged instead of raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])


class _TooLongError(BaseException):
    """Ends a decoder that does not return. No ``except Exception`` may catch it."""


@contextmanager
def guarded() -> Iterator[None]:
    """Limit this process: an input that would take all memory gets MemoryError, and one that never ends is ended."""

    def end(*_: object) -> None:
        raise _TooLongError

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = int(status["VmData"].split()[0]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGVTALRM, end)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_GROWTH_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def check(decoder: Decoder, data: bytes) -> bool:
    """Give ``decoder`` an input, in ``guarded``; return whether it was accepted. Raises DecoderError."""
    logged = _Logged()
    logging.getLogger().addHandler(logged)
    begin_s = time.thread_time()
    accepted = True
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 10 * MAX_CPU_S)
        decoder.read(data)
    except decoder.refusals:
        accepted = False
    except (Exception, _TooLongError, _panic()) as error:
        raise DecoderError(decoder, data, f"{type(error).__name__}: {error!s:.200}", _place(error)) from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        logging.getLogger().removeHandler(logged)
    if logged.errors:
        hidden = logged.errors[0]
        raise DecoderError(decoder, data, f"logged {type(hidden).__name__}: {hidden!s:.200}", _place(hidden))
    took_s = time.thread_time() - begin_s
    if took_s > MAX_CPU_S:
        raise DecoderError(decoder, data, f"slow: {took_s:.1f} s of CPU time")
    return accepted


def _panic() -> type[BaseException]:
    """Return the class of what libraries in Rust raise when they are at fault: no Exception."""
    return next((kind for kind in BaseException.__subclasses__() if kind.__name__ == "PanicException"), _TooLongError)


def _place(error: BaseException) -> str:
    """Return where ``error`` was raised, as far as the code is ours."""
    place, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "site-packages" not in path and "/tests/" not in path:
            place = f"in {Path(path).name}:{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return place


def decoders(directory: Path) -> list[Decoder]:
    """Return all decoders. ``directory`` is empty; their files are there."""
    return [
        *_of_processes(),
        *_of_keys(_made(directory, "keys")),
        *_of_configs(_made(directory, "config")),
        *_of_checkpoints(_made(directory, "model")),
        *_of_stores(_made(directory, "store")),
        *_of_bodies(),
        *_of_bench(_made(directory, "bench")),
    ]


def _made(directory: Path, name: str) -> Path:
    (directory / name).mkdir()
    return directory / name


# ---------------------------------------------------------------- between processes


def _of_processes() -> Iterator[Decoder]:
    yield Decoder("message", decode, (RemoteProtocolError,), [encode(message) for message in EXAMPLES], MSGPACK)
    registration = next(message for message in EXAMPLES if isinstance(message, Register))
    entry = pack_entry(NodeEntry(registration=registration, state="ready", started_s=1.5))
    yield Decoder("registry entry", unpack_entry, (RemoteProtocolError,), [entry], JSON, JSON_WORDS)
    yield Decoder("offer of a link", _offer(), (), [b'{"type":"host","pid":1,"fd":3,"tag":"x","num_blocks":4}'], JSON)
    metrics = MetricsServer(lambda: b"x 1\n", time.monotonic)
    request = b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n"
    yield Decoder("request for a node's metrics", metrics._answer, (), [request], words=[b"\r\n\r\n", b"HEAD", b" "])
    yield from _of_preparation_workers()


def _offer() -> Callable[[bytes], object]:
    """Return what has a messager accept an offer of each kind; each offer is answered once."""
    pool = KVMemory.create(GEOMETRY, 4)
    settings = MessagerSettings(
        me=PeerId("p0.messager#a"),
        node=PeerId("p0#a"),
        node_address="",
        geometry=GEOMETRY,
        pool=pool.handle,
        host="127.0.0.1",
        runtime_dir="",
    )
    mover = BlockMover(settings, pool)
    answers: list[object] = []
    mover.serve(
        cast(Any, None), cast(Any, SimpleNamespace(handle_with=lambda *_: None, post=answers.append, on_close=None))
    )

    def accept(data: bytes) -> None:
        for kind in ("shm", "cuda", "tcp"):
            answers.clear()
            mover._unless_lost(mover._accept)(AcceptLink(1, [LinkOffer(kind, data)]))
            [answer] = answers
            if isinstance(answer, LinkReady) and answer.kind is not None:
                mover._accepted.pop(1).drop(1)

    return accept


def _of_preparation_workers() -> Iterator[Decoder]:
    job = Job(task="chat", body=b"{}", gzipped=True, max_body_bytes=1 << 20, max_model_len=512, max_requests=64)
    prompt = encode_wire([1, 2, 300])
    replies = [
        Reply(Generate(b'{"prompt": "x"}', [msgspec.Raw(prompt)], ["x"], echo=b"{}"), ["x"]),
    ]
    yield Decoder("job of a preparation worker", decode_job, (PreparationError,), [encode_wire(job)], MSGPACK)
    yield Decoder(
        "reply of a preparation worker", decode_reply, (PreparationError,), [*map(encode_wire, replies)], MSGPACK
    )
    yield Decoder("prompt of a preparation worker", decode_prompt, (PreparationError,), [prompt], MSGPACK)


# ---------------------------------------------------------------- files of operators


def _of_keys(directory: Path) -> Iterator[Decoder]:
    make_keys(directory, ["router", "p0"])
    files = [directory / "public" / "p0.key", directory / "secret" / "p0.key", directory / "public" / "router.key"]
    whole = [path.read_bytes() for path in files]

    def load(data: bytes) -> None:
        for path, content in zip(files, whole, strict=True):
            path.write_bytes(data)
            try:
                with suppress(ConfigError):
                    Keys.load(directory, "p0")
            finally:
                path.write_bytes(content)

    yield Decoder("key", load, (), whole, words=[b"\n", b"\0", b" "])
    lines = b"alice sk-2b7e151628aed2a6\n# x\nbob sha256:" + b"6e" * 32 + b" requests=8 tokens_per_minute=60000\n"

    def parse(data: bytes) -> None:
        parse_api_keys(data.decode("utf-8", "surrogateescape"), "keys", RouterConfig())

    words = [b"sha256:", b"requests=", b"tokens_per_minute=", b"9" * 12, b"\n", b"#"]
    yield Decoder("API keys", parse, (ConfigError,), [lines], words=words)


_CONFIG = b"""\
model: {path: ., served_name: demo, aliases: [a]}
cache: &cache {block_size: 16, num_blocks: 64}
router: {port: 8000, api_keys_file: keys, cors_allow_origins: ["*"]}
storage: {backend: redis, url: "redis://:secret@cache:6379/0", ttl_s: 3600}
faults:
  messages: {"*": {delay: 0.05}, Heartbeat: {drop: 0.1}}
nodes:
  - {name: p0, role: prefill, port: 8200, cache: *cache, cpus: [0]}
  - {name: d0, role: decode, port: 8300, kv_events: {endpoint: "tcp://127.0.0.1:5557"}}
"""
_YAML_WORDS = (
    *(
        b"&a ",
        b"*a",
        b"*cache",
        b"<<: *cache\n",
        b"? ",
        b"!!python/object/apply:os.system [x]",
        b"!!binary x",
        b"!!set ",
    ),
    *(b"2001-99-99", b"2001-12-14t21:59:43.10-05:00", b"1:99:99", b"0o99", b"0x", b"!!int ''", b"!!float x", b".nan"),
    *(
        b"1e999",
        b"9" * 5000,
        b"\t",
        b"%YAML 9.9\n---\n",
        b"---\n",
        b"...\n",
        b"'",
        b'"\\x',
        b"|\n",
        b"[" * 50,
        b"{",
        b": ",
    ),
    *(b"null", b"~", b"\0", b"\xff", b"\xe2\x80\xa8", b"&a [*a, *a]", b"!!timestamp x", b"=", b"!!pairs [x]"),
)


def _of_configs(directory: Path) -> Iterator[Decoder]:
    path, plain = directory / "cluster.yaml", directory / "plain.yaml"
    plain.write_bytes(_CONFIG)
    names = b"abcdefghijklm"
    bomb = b"".join(b"%c: &%c [%b]\n" % (a, a, b", ".join([b"*%c" % b] * 9)) for b, a in itertools.pairwise(names))

    def load(data: bytes) -> None:
        path.write_bytes(data)
        ClusterConfig.load(path, env={})

    def override(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        ClusterConfig.load(plain, [text], env={"KVRELAY_ROUTER__PORT": text})

    yield Decoder("config", load, (ConfigError,), [_CONFIG, b"a: &a [x]\n" + bomb], words=_YAML_WORDS)
    sets = [b"router.port=8001", b"nodes.d0.cache.num_blocks=64", b"nodes.0.cpus=[1, 2]", b"cache={block_size: 8}"]
    yield Decoder("override of a config", override, (ConfigError,), sets, words=(*_YAML_WORDS, b".", b"=", b"nodes."))


# ---------------------------------------------------------------- checkpoints


def _of_checkpoints(directory: Path) -> Iterator[Decoder]:
    write_tiny_checkpoint(directory, "qwen3", max_shard_bytes=1 << 19)
    config = read_decoder_config(directory)
    demo = ClusterConfig.from_data({"model": {"path": str(directory)}, "nodes": [_node("m0", "mixed")]})
    reads: dict[str, Callable[[], object]] = {
        "config.json": lambda: (read_decoder_config(directory), read_eos_token_ids(directory), load_model(demo)),
        "generation_config.json": lambda: (read_eos_token_ids(directory), load_model(demo)),
        "model.safetensors.index.json": lambda: Checkpoint.open(directory, config, lambda *_: None),
        "tokenizer_config.json": lambda: load_model(demo),
        "tokenizer.json": lambda: load_model(demo),
        "special_tokens_map.json": lambda: load_model(demo),
        "added_tokens.json": lambda: load_model(demo),
        "chat_template.jinja": lambda: load_model(demo).tokenizer.render_chat([{"role": "user", "content": "x"}]),
    }
    more = {
        "generation_config.json": b'{"eos_token_id": [2, 3], "temperature": 0.5, "top_k": 3}',
        "special_tokens_map.json": b'{"bos_token": {"content": "<s>", "lstrip": true}, "extra_special_tokens": ["x"]}',
        "added_tokens.json": b'{"<x>": 384}',
        "chat_template.jinja": b"{% for m in messages %}{{ m['role'] + m.content | trim }}{% endfor %}{{ x }}",
    }
    jinja = (
        b"{{ ",
        b" }}",
        b"{% for i in range(99999999999) %}",
        b"{% endfor %}",
        b"{% set x = x.__class__ %}",
        b"|tojson",
        b"{% raw %}",
    )
    for name, read in reads.items():
        path = directory / name
        before = path.read_bytes() if path.exists() else None
        example = more.get(name, before)
        assert example is not None
        read_file = _file_reader(path, before, read)
        is_json = name.endswith(".json")
        refusals = (CheckpointError,) if is_json else (KVRelayError,)
        yield Decoder(name, read_file, refusals, [example], JSON if is_json else None, JSON_WORDS if is_json else jinja)
    yield from _of_safetensors(directory, config)


def _node(name: str, role: str) -> dict[str, object]:
    return {"name": name, "role": role, "port": 8200}


def _file_reader(path: Path, before: bytes | None, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Return what reads with an input in the place of ``path``."""

    def read_with(data: bytes) -> object:
        path.write_bytes(data)
        try:
            return read()
        finally:
            if before is None:
                path.unlink()
            else:
                path.write_bytes(before)

    return read_with


def _of_safetensors(directory: Path, config: DecoderConfig) -> Iterator[Decoder]:
    path = sorted(directory.glob("model-*.safetensors"))[0]
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, body = whole[8 : 8 + size], whole[8 + size :]

    def read_all() -> None:
        checkpoint = Checkpoint.open(directory, config, lambda *_: None)
        checkpoint.read_all()

    read = _file_reader(path, whole, read_all)
    yield Decoder(
        "header of safetensors",
        lambda data: read(len(data).to_bytes(8, "little") + data + body),
        (CheckpointError,),
        [header],
        JSON,
        JSON_WORDS,
    )
    yield Decoder("safetensors", read, (CheckpointError,), [whole[: 8 + size + 64]])


# ---------------------------------------------------------------- stored KV


def _of_stores(directory: Path) -> Iterator[Decoder]:
    kv = BlockFormat(GEOMETRY)
    hashes = BlockHasher(GEOMETRY.model_digest, 1).hashes(range(3))
    blocks = np.random.default_rng(0).integers(0, 256, (3, *kv.block_shape), np.uint8)
    value = np.empty(kv.value_bytes, np.uint8)
    kv.payload(value)[...] = blocks[0]
    kv.seal(value, hashes[0])
    good = value.tobytes()

    def is_good(data: bytes) -> None:
        assert kv.is_good(np.frombuffer(data, np.uint8), hashes[0]) == (data == good)

    yield Decoder("stored value", is_good, (), [good])

    def with_store(work: Callable[[Store], Any], root: Path) -> Any:
        async def scenario() -> Any:
            backend = FileBackend(GEOMETRY, root, 64 << 10, 1.0, Clock())
            store = Store(backend, GEOMETRY, 1.0, Clock())
            await store.open()
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(scenario())

    async def put(store: Store) -> None:
        await store.put(hashes, list(blocks))

    async def use(store: Store) -> None:
        into = np.zeros_like(blocks)
        hits = await store.get(hashes, list(into))
        assert all(np.array_equal(into[i], blocks[i]) for i, hit in enumerate(hits) if hit)
        await store.put(hashes, list(blocks))
        await store.verify()
        await store.stats()

    with_store(put, directory)
    [index], [slab] = directory.glob("*/index"), directory.glob("*/slab-*")
    for path in (index, slab):
        whole = path.read_bytes()
        read = _store_reader(path, whole, lambda: with_store(use, directory), directory)
        yield Decoder(f"{path.name.partition('-')[0]} of the file store", read, (StorageError,), [whole])


def _store_reader(path: Path, whole: bytes, use: Callable[[], object], root: Path) -> Callable[[bytes], object]:
    """Return what uses a file store with an input in the place of ``path``, all else as it was."""
    files = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}

    def read(data: bytes) -> object:
        for file in root.rglob("*"):
            if file.is_file() and file not in files:
                file.unlink()
        for file, content in files.items():
            file.write_bytes(data + whole[len(data) :] if file == path and len(data) >= 4000 else content)
        if len(data) < 4000:
            path.write_bytes(data)
        return use()

    return read


# ---------------------------------------------------------------- HTTP bodies


def _of_bodies() -> Iterator[Decoder]:
    config = ClusterConfig.from_data(
        {
            "model": {"path": "nowhere", "max_model_len": 512},
            "engine": {"kind": "fake"},
            "router": {"tool_parser": "hermes"},
            "nodes": [_node("m0", "mixed")],
        }
    )
    preparation = Preparation(load_model(config))
    zipped = gzip.compress(b'{"prompt": "x"}', mtime=0)
    read = partial(_prepare, preparation, "completions", gzipped=True)
    yield Decoder("gzipped body", read, (KVRelayError, AnswerError), [zipped])
    for task, bodies in _BODIES.items():
        yield Decoder(
            f"body of {task}",
            partial(_prepare, preparation, task),
            (KVRelayError, AnswerError),
            [json.dumps(body).encode() for body in bodies],
            JSON,
            JSON_WORDS,
        )


def _prepare(preparation: Preparation, task: Task, data: bytes, *, gzipped: bool = False) -> None:
    limits = {"max_body_bytes": 1 << 20, "max_model_len": 512, "max_requests": 64}
    preparation.prepare(Job(task=task, body=data, gzipped=gzipped, **limits))


_TOOL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}
_COMMON = {
    "model": None,
    "temperature": 0.5,
    "logit_bias": {"7": 1.5},
    "stop_token_ids": [1],
    "seed": 3,
    "stream": True,
    "chat_template_kwargs": {"x": True},
}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_BODIES: dict[Task, list[dict[str, object]]] = {
    "completions": [
        {"prompt": ["a", "b"], "max_tokens": 3, "n": 2, "stop": ["x", "y"], "logprobs": 2, "echo": True, **_COMMON},
        {"prompt": [[1, 2], [3]], "stream_options": {"include_usage": True}, "best_of": 1, **_COMMON},
        {"prompt": "x", "structured_outputs": {"regex": "a+b?"}},
        {"prompt": "x", "guided_choice": ["a", "b"], "response_format": {"type": "text"}},
    ],
    "chat": [
        {
            "messages": [
                {"role": "system", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "7"},
            ],
            "tools": [_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "top_logprobs": 2,
            "logprobs": True,
            **_COMMON,
        },
        {
            "messages": [{"role": "user", "content": "hi"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
            },
        },
    ],
    "responses": [
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
                {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
                {"type": "function_call_output", "call_id": "c", "output": "7"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}},
            "include": ["reasoning.encrypted_content"],
            "reasoning": {"effort": "low"},
            "metadata": {"a": "b"},
            **_COMMON,
        }
    ],
    "messages": [
        {
            "system": [{"type": "text", "text": "be"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "x"},
                        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "7"}]},
            ],
            "max_tokens": 3,
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 7},
            "stop_sequences": ["x"],
            **_COMMON,
        }
    ],
    "responses_tokens": [{"input": "hi", "instructions": "be"}],
    "messages_tokens": [{"messages": [{"role": "user", "content": "hi"}], "output_config": {"effort": "low"}}],
    "tokenize": [{"prompt": "hi", "return_token_strs": True}, {"messages": [{"role": "user", "content": "hi"}]}],
    "detokenize": [{"tokens": [1, 2, 300]}],
}


# ---------------------------------------------------------------- kvrelay bench


def _of_bench(directory: Path) -> Iterator[Decoder]:
    path = directory / "trace"

    def read_with(load: ShareGPTLoad | MooncakeLoad) -> Callable[[bytes], object]:
        def read(data: bytes) -> object:
            path.write_bytes(data)
            return load.conversations(WordPrompts(1.0), 0)

        return read

    chats = [
        {"conversations": [{"from": "human", "value": "a b c d e f " * 9}, {"from": "gpt", "value": "g " * 40}]}
    ] * 3
    lines = [{"timestamp": 100 * n, "input_length": 700, "output_length": 3, "hash_ids": [0, n]} for n in range(4)]
    trace = "\n".join(map(json.dumps, lines)).encode()
    chat = json.dumps(chats).encode()
    yield Decoder(
        "ShareGPT file", read_with(ShareGPTLoad(path, 4, max_turns=2)), (BenchError,), [chat], JSON, JSON_WORDS
    )
    yield Decoder(
        "trace of Mooncake", read_with(MooncakeLoad(path)), (BenchError,), [trace], None, (*JSON_WORDS, b"\n")
    )
    line = json.dumps(lines[0]).encode()
    yield Decoder("line of a trace", read_with(MooncakeLoad(path)), (BenchError,), [line], JSON, JSON_WORDS)
    chunk = {"id": "x", "choices": [{"text": "a", "delta": {"content": "b"}}], "usage": {"completion_tokens": 1}}
    events = b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for _ in range(3)) + b"data: [DONE]\n\n"
    yield Decoder("stream of events", _read_events, (), [events], None, (*JSON_WORDS, b"\ndata:", b"\n\n", b"[DONE]"))
    error = {**chunk, "error": {"message": "x", "code": 1}, "message": "y"}
    yield Decoder(
        "event of a stream",
        lambda data: _read_events(b"data: " + data + b"\n\n"),
        (),
        [json.dumps(chunk).encode(), json.dumps(error).encode()],
        JSON,
        JSON_WORDS,
    )
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"
    yield Decoder(
        "HTTP answer",
        _read_answer,
        (OSError,),
        [answer],
        words=[b"\r\n", b"\r\n\r\n", b"ffffffff\r\n", b"HTTP/9.9", b": "],
    )


def _read_events(data: bytes) -> None:
    texts: list[str] = []
    reader = _StreamReader(texts)
    for start in range(0, len(data), 1000):
        reader.take(data[start : start + 1000], 1.0)
    _message(reader.head)


def _read_answer(data: bytes) -> Answer:
    """Return the answer that a client of ``kvrelay bench`` makes of ``data``, in pieces, before the connection ends."""

    async def scenario() -> Answer:
        connection = _Connection()
        transport = SimpleNamespace(write=lambda _: None, close=lambda: None)
        connection.connection_made(cast(asyncio.BaseTransport, transport))
        waiting = asyncio.ensure_future(connection.exchange(b"", lambda *_: None))
        await asyncio.sleep(0)
        for start in range(0, len(data), 700):
            connection.data_received(data[start : start + 700])
        connection.connection_lost(None)
        return await waiting

    return asyncio.run(scenario())
