"""The sections of the cluster config: every key with its type, bounds, default and unit.

The configuration reference and ``kvrelay config schema`` are generated from these classes.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from kvrelay.addresses import HOST_PATTERN, NETLOC_PATTERN, TCP_PATTERN, check_host, netloc, split_tcp_address
from kvrelay.errors import ConfigError

_SIZE_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Role(StrEnum):
    """What a node does."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


def refuse(reason: str, *key: str | int) -> PydanticCustomError:
    """Return the error for an invalid value at ``key``, relative to the section."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason, "key": key})


def _parse_size(value: object) -> object:
    """Return a text such as ``"64MiB"`` as a number of bytes. A number is returned unchanged."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|B|)", value.strip())
    if match is None:
        raise refuse("should be a size such as 67108864, 64MiB or 8GiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _checked_host(host: str) -> str:
    try:
        check_host(host)
    except ValueError as error:
        raise refuse(str(error)) from None
    return host


def _checked_tcp_address(address: str) -> str:
    try:
        split_tcp_address(address)
    except ValueError as error:
        raise refuse(str(error)) from None
    return address


Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, Field(min_length=1, max_length=253, pattern=HOST_PATTERN), AfterValidator(_checked_host)]
TcpAddress = Annotated[str, Field(max_length=300, pattern=TCP_PATTERN), AfterValidator(_checked_tcp_address)]
SizeBytes = Annotated[int, BeforeValidator(_parse_size, json_schema_input_type=int | str)]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """The model that all nodes serve."""

    path: str = Field("models/demo", min_length=1, description="Directory of the checkpoint, in Hugging Face layout.")
    served_name: str | None = Field(
        None, min_length=1, description="Model name for clients; default: the directory's name."
    )
    aliases: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), strict=False, description="More model names for clients; the checkpoint's path is always one."
    )
    dtype: DType = Field(
        "auto", description="Type of weights and compute; auto: the checkpoint's if that is fast, else float32."
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto",
        description="dummy: random weights made on the device, of the shape in config.json; engine.kind torch only.",
    )
    max_model_len: int | None = Field(
        None, ge=1, le=1 << 22, description="Maximum prompt plus output, in tokens; default: the checkpoint's."
    )

    @property
    def name(self) -> str:
        """The model name for clients."""
        return self.served_name or self.path.rstrip("/").rpartition("/")[2]


class RouterConfig(Section):
    """The router: its HTTP address for clients, its control address for nodes, and its limits."""

    host: Host = Field(
        "127.0.0.1",
        description="Address of the HTTP server; :: (with IPv6) means all IPv4 and IPv6 addresses.",
    )
    port: Port = Field(8000, description="Port of the HTTP server.")
    control: TcpAddress = Field(
        "tcp://127.0.0.1:8100",
        description="registry static: address at which the router listens for nodes, as tcp://host:port (IPv6: "
        "tcp://[::1]:8100).",
    )
    prefill_routing: Literal["least_loaded", "round_robin"] = Field(
        "least_loaded", description="Policy that chooses the prefill or mixed node of a request."
    )
    decode_routing: Literal["least_loaded", "round_robin"] = Field(
        "least_loaded", description="Policy that chooses the decode node of a request."
    )
    local_prefill_tokens: int | None = Field(
        None,
        ge=0,
        le=1 << 30,
        description="Threshold of conditional disaggregation, in prompt tokens: a decode node with room computes a "
        "prompt itself if every prefill node has at least this many more prompt tokens to compute than it has, or if "
        "there is no prefill node; null: off.",
    )
    max_queued_requests: int = Field(
        512, ge=1, le=1_000_000, description="Maximum requests admitted and not finished; more get 429."
    )
    max_attempts: int = Field(3, ge=1, le=100, description="Maximum attempts at a request before its error is final.")
    node_wait_s: float = Field(
        30.0, gt=0, le=3600, description="Seconds a request waits for a node if none can take it."
    )
    request_timeout_s: float = Field(
        600.0, gt=0, le=86400, description="Seconds from admission after which a request fails."
    )
    max_body_bytes: SizeBytes = Field(
        16 << 20,
        ge=1024,
        le=1 << 30,
        description="Maximum HTTP request body, in bytes (also 16MiB), decompressed; larger ones get 413.",
    )
    max_total_body_bytes: SizeBytes = Field(
        512 << 20,
        ge=1024,
        le=1 << 40,
        description="Maximum memory for the bodies of all requests that are not tokenized yet, in bytes (also 512MiB), "
        "at least max_body_bytes; bodies beyond it get 503. Bodies up to 16 KiB are always accepted.",
    )
    max_header_bytes: SizeBytes = Field(
        64 << 10, ge=1024, le=1 << 24, description="Maximum request line plus headers; larger ones get 431."
    )
    request_read_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds from the first to the last byte of a request; then 408."
    )
    keep_alive_timeout_s: float = Field(
        75.0, gt=0, le=86400, description="Seconds after which the router closes an idle connection."
    )
    preparation_workers: int = Field(
        2, ge=1, le=64, description="Maximum processes that prepare long bodies; started when needed."
    )
    preparation_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds a worker may take to prepare a long body; then 503."
    )
    cors_allow_origins: tuple[str, ...] = Field(
        (), strict=False, description='Origins whose web pages may use the API; ["*"]: any; default: none.'
    )
    access_log: bool = Field(
        True, description="Log one line per HTTP request; probes such as /health only at log_level debug."
    )

    @model_validator(mode="after")
    def _room_for_a_body(self) -> Self:
        if self.max_total_body_bytes < self.max_body_bytes:
            raise refuse(
                f"{self.max_total_body_bytes} is below max_body_bytes ({self.max_body_bytes})", "max_total_body_bytes"
            )
        return self

    @property
    def url(self) -> str:
        """Base URL of the HTTP server."""
        return f"http://{netloc(self.host, self.port)}"


class CacheConfig(Section):
    """The KV pool of a node."""

    block_size: int = Field(16, ge=1, le=1024, description="Tokens per KV block; must be equal on all nodes.")
    num_blocks: Annotated[int, Field(ge=2, le=1 << 24)] | Literal["auto"] = Field(
        4096, description="KV blocks in the pool; auto (engine.kind torch on a GPU): as many as fit beside the model."
    )
    device_memory_share: float = Field(
        0.9, gt=0, le=1, description="num_blocks auto: share of the device's memory for weights, graphs and pool."
    )
    dtype: DType = Field("auto", description="Type of the KV cache; auto: the type of compute.")
    prefix_caching: bool = Field(True, description="Reuse the KV blocks of equal prompt prefixes.")
    output_caching: bool = Field(
        True,
        description="Publish the output blocks of finished requests in the prefix cache, for the next turn of a chat.",
    )

    @property
    def fixed_num_blocks(self) -> int:
        """The blocks of a pool whose size does not depend on the device. Raises ConfigError for auto."""
        if self.num_blocks == "auto":
            raise ConfigError(["cache.num_blocks: auto needs engine.kind: torch and engine.device: gpu"])
        return self.num_blocks


class NewTokenRatioConfig(Section):
    """Reserve policy new_token_ratio: keep blocks for a share of the tokens each running request may still generate."""

    init: float = Field(0.7, ge=0, le=1, description="Ratio at start and when the node becomes idle.")
    min: float = Field(0.1, ge=0, le=1, description="Minimum ratio.")
    decay: float = Field(0.001, ge=0, le=1, description="Decrease of the ratio per step.")
    clip_max_new_tokens: int = Field(
        4096, ge=1, le=1 << 22, description="Maximum remaining tokens counted per request."
    )

    @model_validator(mode="after")
    def _min_below_init(self) -> Self:
        if self.min > self.init:
            raise refuse(f"{self.min} is above init ({self.init}): the ratio falls from init to min", "min")
        return self


class FixedBlocksConfig(Section):
    """Reserve policy fixed_blocks: keep a number of blocks per running request, which decreases with each step."""

    blocks: int = Field(16, ge=0, le=1 << 20, description="Blocks per running request at start and after a preemption.")
    decay: float = Field(0.025, ge=0, le=1 << 20, description="Decrease of that number per step.")
    min_blocks: int = Field(0, ge=0, le=1 << 20, description="Minimum blocks per running request.")

    @model_validator(mode="after")
    def _min_below_blocks(self) -> Self:
        if self.min_blocks > self.blocks:
            raise refuse(
                f"{self.min_blocks} is above blocks ({self.blocks}): the reserve falls from blocks to min_blocks",
                "min_blocks",
            )
        return self


class SGLangReserveConfig(Section):
    """Reserve policy sglang: a new prompt needs room for its clipped output, each decode for a falling share of it."""

    init: float = Field(0.7, ge=0, le=1, description="Share at start and when the node becomes idle.")
    min_factor: float = Field(0.14, ge=0, le=1, description="The minimum share is min_factor * init.")
    decay_steps: int = Field(600, ge=1, le=1 << 30, description="Decode steps from init to the minimum share.")
    retract_decode_steps: int = Field(
        20, ge=1, le=1 << 20, description="A preemption frees room for this many tokens of every remaining decode."
    )
    clip_max_new_tokens: int = Field(
        4096, ge=1, le=1 << 22, description="Maximum remaining tokens counted per request."
    )


class SchedulerConfig(Section):
    """The batch of a step, the blocks kept free for running requests, and preemption."""

    max_num_batched_tokens: int = Field(2048, ge=1, le=1 << 22, description="Token budget of one step.")
    max_num_seqs: int = Field(64, ge=1, le=65536, description="Maximum requests that run on a node at once.")
    prefill_policy: Literal["dedicated", "shared"] = Field(
        "dedicated", description="Scheduler of prefill nodes; shared: with the decode reserve, for comparison."
    )
    prefill_order: Literal["fifo", "shortest_first"] = Field(
        "shortest_first",
        description="Order of prompts; shortest_first: the prompt with the fewest tokens still to compute (without "
        "cached tokens) is first.",
    )
    prefill_overtake_tokens: int = Field(
        16384,
        ge=0,
        le=1 << 30,
        description="Bound of shortest_first: at most this many prompt tokens that arrived later are computed before a "
        "prompt (on decode nodes, reservations count too); max_num_batched_tokens or less gives the order of arrival.",
    )
    reserve_policy: Literal["new_token_ratio", "fixed_blocks", "sglang", "none"] = Field(
        "new_token_ratio", description="Blocks kept free for running requests when a request is admitted."
    )
    new_token_ratio: NewTokenRatioConfig = Field(default_factory=NewTokenRatioConfig)
    fixed_blocks: FixedBlocksConfig = Field(default_factory=FixedBlocksConfig)
    sglang: SGLangReserveConfig = Field(default_factory=SGLangReserveConfig)
    watermark: float = Field(
        0.01, ge=0, lt=1, description="Share of the pool that stays free when a request is admitted."
    )
    preemption_order: Literal["latest_first", "shortest_output_first"] = Field(
        "latest_first", description="Which decode is preempted first."
    )
    requeue: Literal["front", "tail"] = Field(
        "front", description="Position of a preempted request among those of its priority."
    )
    enable_priority_scheduling: bool = Field(
        False,
        description="Admit by priority (lower first); a prompt with a higher priority may preempt a decode.",
    )
    priority_aging_s: float = Field(
        10.0, gt=0, le=86400, description="Seconds of waiting that raise a request by one priority level."
    )


class SpeculativeConfig(Section):
    """Speculative decoding: drafts are verified in one step. The output equals that without drafts."""

    method: Literal["none", "naive", "ngram"] = Field(
        "none", description="naive: speculative path without drafts; ngram: drafts from the tokens so far."
    )
    num_speculative_tokens: int = Field(4, ge=1, le=64, description="Maximum drafts per request and step.")
    ngram_min: int = Field(2, ge=1, le=64, description="Minimum length of an n-gram.")
    ngram_max: int = Field(4, ge=1, le=64, description="Maximum length of an n-gram.")

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.ngram_min > self.ngram_max:
            raise refuse(f"{self.ngram_min} is above ngram_max ({self.ngram_max})", "ngram_min")
        return self


LinkKind = Literal["cuda", "shm", "ipc", "tcp"]
"""All kinds of link (``cache_messager/links``), the fastest first."""

LINK_KINDS: tuple[LinkKind, ...] = get_args(LinkKind)

_LINK_CHOICES: dict[str, tuple[LinkKind, ...]] = {"auto": LINK_KINDS, "zmq": ("ipc", "tcp"), "shm": ("shm", "ipc")}


class TransferConfig(Section):
    """KV transfer from prefill to decode nodes."""

    link: LinkKind | Literal["auto", "zmq"] = Field(
        "auto",
        description="Kind of link; auto: the fastest possible, which is cuda or shm on the same host (ipc if the pool "
        "cannot be mapped), else tcp; cuda: from GPU memory to GPU memory on the same host; zmq: ipc on the same host, "
        "else tcp; shm: ipc if the pool cannot be mapped.",
    )
    layerwise: bool = Field(
        True, description="Send each layer when it is computed; off: send a prompt when all of it is computed."
    )
    checksum: bool = Field(True, description="ipc, tcp: verify a digest of every frame (xxh3); shm and cuda always do.")
    lease_s: float = Field(
        30.0, gt=0, le=3600, description="Seconds after which a reservation expires unless its prefill node renews it."
    )
    timeout_s: float = Field(60.0, gt=0, le=3600, description="Seconds without progress after which a transfer fails.")
    max_inflight_bytes: SizeBytes = Field(
        64 << 20,
        ge=1 << 16,
        le=1 << 40,
        description="Maximum unacknowledged KV per sender to a decode node, in bytes (also 64MiB).",
    )

    @property
    def link_kinds(self) -> tuple[str, ...]:
        """The kinds of link that ``link`` allows, the fastest first."""
        return _LINK_CHOICES.get(self.link, (self.link,))


_STORAGE_KEYS: dict[str, set[str]] = {
    "none": set(),
    "memory": {"capacity"},
    "file": {"path", "capacity"},
    "redis": {"url", "ttl_s", "payload", "path", "capacity"},
    "mooncake": {"master", "capacity"},
}
STORED_BACKENDS = tuple(backend for backend in _STORAGE_KEYS if backend != "none")
"""The backends that store blocks."""

_STORAGE_KEYS_OF_ALL = {
    "backend",
    "timeout_s",
    "read_timeout_s",
    "min_read_tokens",
    "staging",
    "write_policy",
    "resume",
}
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class StorageConfig(Section):
    """The store for KV blocks of preempted and finished requests."""

    backend: Literal["none", "memory", "file", "redis", "mooncake"] = Field(
        "none", description="none: evicted KV is recomputed; memory: stored in the node's process."
    )
    path: str = Field(
        ".kvrelay/kv",
        min_length=1,
        description="file, and redis with payload owner: directory; shared by the nodes of a host.",
    )
    capacity: SizeBytes = Field(
        8 << 30,
        ge=1 << 16,
        le=1 << 50,
        description="Maximum size of stored KV per node, or per host (file), in bytes (also 8GiB).",
    )
    url: SecretStr | None = Field(
        None, description="redis: redis://, rediss:// or unix:// with password and database; a cluster: any node of it."
    )
    ttl_s: int = Field(86400, ge=1, le=1 << 30, description="redis: seconds a block is stored after its last use.")
    payload: Literal["redis", "owner"] = Field(
        "redis", description="redis: KV in Redis; owner: KV in path on the host that wrote it, its location in Redis."
    )
    master: str = Field(
        "127.0.0.1:50051",
        pattern=NETLOC_PATTERN,
        description="mooncake: host:port of the master (IPv6: [::1]:50051).",
    )
    timeout_s: float = Field(
        2.0,
        gt=0,
        le=600,
        description="Deadline of a call, in seconds; then KV is recomputed (read) or dropped (write).",
    )
    read_timeout_s: float = Field(
        0.5, gt=0, le=600, description="Seconds a new prompt waits for its prefix from the store; then it is computed."
    )
    min_read_tokens: int = Field(
        64, ge=1, le=1 << 20, description="Minimum tokens worth a read; shorter prefixes are computed."
    )
    staging: SizeBytes = Field(
        64 << 20,
        ge=1 << 16,
        le=1 << 40,
        description="Staging memory of a node for writes, in bytes (also 64MiB); if full, blocks are not saved.",
    )
    write_policy: Literal["on_finish", "on_preempt", "off"] = Field(
        "on_finish",
        description="on_preempt: write the KV of preempted requests; on_finish: of finished ones too; off: nothing.",
    )
    resume: Literal["storage", "recompute", "auto"] = Field(
        "auto",
        description="How a preempted request regains KV; storage: reload; auto: what has been faster on this node.",
    )

    @model_validator(mode="after")
    def _keys_of_the_backend(self) -> Self:
        foreign = self.model_fields_set - _STORAGE_KEYS_OF_ALL - _STORAGE_KEYS[self.backend]
        if self.backend != "none" and foreign:
            raise refuse(f"{self.backend} does not use {', '.join(sorted(foreign))}", "backend")
        if self.backend == "redis" and (self.url is None or not self.url.get_secret_value().startswith(_REDIS_SCHEMES)):
            raise refuse(f"redis needs a url that begins with {', '.join(_REDIS_SCHEMES)}", "url")
        return self


class RegistryConfig(Section):
    """How routers and nodes find each other."""

    kind: Literal["static", "redis"] = Field(
        "static",
        description="static: nodes connect to one router at router.control; redis: any number of routers find nodes.",
    )
    url: SecretStr | None = Field(
        None, description="redis: redis://, rediss:// or unix:// with password and database; a cluster: any node of it."
    )
    cluster: str = Field(
        "default",
        max_length=64,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="redis: name of the cluster; several clusters may share one Redis.",
    )
    lease_s: float = Field(
        10.0, ge=0.1, le=3600, description="redis: seconds after which the entry of a dead node expires."
    )

    @model_validator(mode="after")
    def _redis_has_a_url(self) -> Self:
        if self.kind == "redis" and (self.url is None or not self.url.get_secret_value().startswith(_REDIS_SCHEMES)):
            raise refuse(f"redis needs a url that begins with {', '.join(_REDIS_SCHEMES)}", "url")
        return self


class FakeEngineConfig(Section):
    """The engine without a model: tokens from a hash of the context, step times from a cost model."""

    vocab_size: int = Field(1024, ge=2, le=1 << 24, description="Size of the vocabulary.")
    max_model_len: int = Field(32768, ge=1, le=1 << 22, description="Maximum sequence length, in tokens.")
    num_layers: int = Field(4, ge=1, le=1024, description="Layers of the KV cache.")
    num_kv_heads: int = Field(2, ge=1, le=1024, description="KV heads per layer.")
    head_dim: int = Field(8, ge=1, le=4096, description="Elements per KV head.")
    step_s: float = Field(0.0, ge=0, le=60, description="Seconds per step.")
    prefill_token_s: float = Field(0.0, ge=0, le=60, description="Seconds per token of a prompt chunk.")
    decode_token_s: float = Field(0.0, ge=0, le=60, description="Seconds per decode.")
    context_token_s: float = Field(0.0, ge=0, le=60, description="Seconds per token of context.")
    eos_every: int = Field(
        256, ge=0, le=1 << 32, description="About one token in this many ends the sequence; 0: none."
    )
    broken_token: int | None = Field(
        None,
        ge=0,
        le=1 << 24,
        description="A sequence with this token fails like one with hidden states that are not finite.",
    )
    max_plans_in_flight: int = Field(
        1, ge=1, le=2, description="Plans in flight; 2: as a device with a queue of steps."
    )
    device_pool: bool = Field(
        False, description="Put the KV pool on a simulated device, so that transfer.link: cuda works without a GPU."
    )


class EngineConfig(Section):
    """The engine that computes the steps."""

    kind: Literal["paddle", "torch", "fake"] = Field(
        "paddle",
        description="paddle: Paddle; torch: torch and Triton, needs the extra torch; fake: no model, for tests.",
    )
    device: Literal["cpu", "gpu"] = Field("cpu", description="Device of the engine; torch on cpu is for tests.")
    kernels: Literal["auto", "native", "portable"] = Field(
        "auto",
        description="native: oneDNN and compiled kernels; portable: Paddle's operators; auto: native if available.",
    )
    quantization: Literal["none", "w8a8", "w8a16", "fp8"] = Field(
        "none",
        description="Linear layers but the head, in int8 (paddle; w8a16: weights; w8a8: weights and activations) or in "
        "float8 (torch; fp8: both); none: model.dtype.",
    )
    deterministic: bool = Field(
        False,
        description="torch on a GPU: a token has the same bits in any batch and in any chunk of its prompt; slower.",
    )
    fake: FakeEngineConfig = Field(default_factory=FakeEngineConfig)


class ClusterSettings(Section):
    """Heartbeats, start, restart and end of processes, logging."""

    heartbeat_s: float = Field(1.0, gt=0, le=60, description="Seconds between heartbeats.")
    peer_timeout_s: float = Field(
        5.0, gt=0, le=3600, description="Seconds without a message after which a peer is lost."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, le=86400, description="Seconds for running requests to finish when a process is told to stop."
    )
    start_timeout_s: float = Field(
        600.0, gt=0, le=86400, description="Seconds for the cluster to become ready, including loading of weights."
    )
    restart_backoff_s: float = Field(
        0.5, gt=0, le=3600, description="Seconds before a crashed process is restarted; doubled after each crash."
    )
    restart_backoff_max_s: float = Field(30.0, gt=0, le=3600, description="Maximum of that delay, in seconds.")
    max_crashes: int = Field(
        3,
        ge=1,
        le=1000,
        description="Consecutive crashes (before it is ready, or by SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGABRT) after "
        "which a process is not restarted and the cluster ends.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Minimum level of log lines.")

    @model_validator(mode="after")
    def _timeout_above_heartbeat(self) -> Self:
        if self.peer_timeout_s <= self.heartbeat_s:
            raise refuse(
                f"{self.peer_timeout_s} is not above heartbeat_s ({self.heartbeat_s}): every peer would be lost",
                "peer_timeout_s",
            )
        return self
