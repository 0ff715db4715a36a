"""The sections of the cluster config: every key with its type, bounds, default and unit.

The configuration reference and ``kvrelay config schema`` are made from these classes.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from kvrelay.addresses import HOST_PATTERN, TCP_PATTERN, check_host, netloc, split_tcp_address

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
    """Return the error that says why the value at ``key`` (relative to the section) cannot be."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason, "key": key})


def _parse_size(value: object) -> object:
    """Return ``"64MiB"`` as bytes; a plain number is bytes already."""
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
    """The model all nodes serve."""

    path: str = Field("models/demo", min_length=1, description="Directory of the checkpoint in Hugging Face layout.")
    served_name: str | None = Field(
        None, min_length=1, description="Name clients ask for; default: the directory's name."
    )
    aliases: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), strict=False, description="Further names clients may ask for; the checkpoint's path is one anyway."
    )
    dtype: DType = Field(
        "auto", description="Type of weights and compute; auto: the checkpoint's where that is fast, else float32."
    )
    max_model_len: int | None = Field(
        None, ge=1, le=1 << 22, description="Longest prompt plus output, in tokens; default: the checkpoint's."
    )

    @property
    def name(self) -> str:
        """The name clients ask for."""
        return self.served_name or self.path.rstrip("/").rpartition("/")[2]


class RouterConfig(Section):
    """The router: HTTP for clients, a control address for nodes."""

    host: Host = Field(
        "127.0.0.1",
        description="Address the HTTP server listens on; ::, where there is IPv6, stands for all of both kinds.",
    )
    port: Port = Field(8000, description="Port the HTTP server listens on.")
    control: TcpAddress = Field(
        "tcp://127.0.0.1:8100",
        description="registry static: where nodes reach the router, as tcp://host:port (IPv6: tcp://[::1]:8100); the "
        "router listens there.",
    )
    prefill_policy: Literal["least_loaded", "round_robin"] = Field(
        "least_loaded", description="How the prefill (or mixed) node of a request is chosen."
    )
    decode_policy: Literal["least_loaded", "round_robin"] = Field(
        "least_loaded", description="How the decode node of a request is chosen."
    )
    local_prefill_tokens: int | None = Field(
        None,
        ge=0,
        le=1 << 30,
        description="A decode node with room computes a prompt itself when all prefill nodes have so many more prompt "
        "tokens to compute than it has, or when there are none; null: never.",
    )
    max_queued_requests: int = Field(
        512, ge=1, le=1_000_000, description="Requests admitted and not finished; more are answered 429."
    )
    max_attempts: int = Field(3, ge=1, le=100, description="How often a request is tried before its error is final.")
    node_wait_s: float = Field(
        30.0, gt=0, le=3600, description="Seconds a request waits for a node that was lost or left to come back."
    )
    request_timeout_s: float = Field(
        600.0, gt=0, le=86400, description="Seconds from admission after which a request ends with an error."
    )
    max_body_bytes: SizeBytes = Field(
        16 << 20, ge=1024, le=1 << 30, description="Longest HTTP request body, in bytes (also 16MiB), decompressed."
    )
    max_header_bytes: SizeBytes = Field(
        64 << 10, ge=1024, le=1 << 24, description="Longest request line and headers together; longer ones get 431."
    )
    request_read_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds a client may take to send a request once it has begun; then 408."
    )
    keep_alive_timeout_s: float = Field(
        75.0, gt=0, le=86400, description="Seconds a connection may be idle before the router closes it."
    )
    preparation_workers: int = Field(
        2, ge=1, le=64, description="Processes that tokenize long bodies, started when needed; short ones need none."
    )
    preparation_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds a worker may take to make prompts of a long body; then 503."
    )
    cors_allow_origins: tuple[str, ...] = Field(
        (), strict=False, description='Origins whose web pages may use the API, or ["*"] for any; none by default.'
    )
    access_log: bool = Field(
        True, description="Log a line per HTTP request; those of probes such as /health at log_level debug only."
    )

    @property
    def url(self) -> str:
        """Base URL of the HTTP server."""
        return f"http://{netloc(self.host, self.port)}"


class CacheConfig(Section):
    """A node's pool of KV blocks."""

    block_size: int = Field(16, ge=1, le=1024, description="Tokens per KV block; equal on all nodes.")
    num_blocks: int = Field(4096, ge=2, le=1 << 24, description="KV blocks in the node's pool.")
    dtype: DType = Field("auto", description="Type of the KV cache; auto: the type of compute.")
    prefix_caching: bool = Field(True, description="Reuse blocks of prompts that begin alike.")
    output_caching: bool = Field(
        True, description="Keep finished requests' output blocks for reuse: the next turn of a chat hits them."
    )


class NewTokenRatioConfig(Section):
    """Reserve policy new_token_ratio: every running request may still grow by a share of what it may generate."""

    init: float = Field(0.7, ge=0, le=1, description="Share at start and after idling.")
    min: float = Field(0.1, ge=0, le=1, description="The share falls no lower.")
    decay: float = Field(0.001, ge=0, le=1, description="Fall of the share per step that scheduled something.")
    clip_max_new_tokens: int = Field(
        4096, ge=1, le=1 << 22, description="A request counts with at most so many tokens to come."
    )

    @model_validator(mode="after")
    def _min_below_init(self) -> Self:
        if self.min > self.init:
            raise refuse(f"{self.min} is above init ({self.init}): the ratio falls from init to min", "min")
        return self


class FixedBlocksConfig(Section):
    """Reserve policy fixed_blocks: so many blocks for every running request, fewer with each step."""

    blocks: int = Field(16, ge=0, le=1 << 20, description="Blocks per running request at start and after a preemption.")
    decay: float = Field(0.025, ge=0, le=1 << 20, description="Blocks less per step.")
    min_blocks: int = Field(0, ge=0, le=1 << 20, description="The reserve per running request falls no lower.")

    @model_validator(mode="after")
    def _min_below_blocks(self) -> Self:
        if self.min_blocks > self.blocks:
            raise refuse(
                f"{self.min_blocks} is above blocks ({self.blocks}): the reserve falls from blocks to min_blocks",
                "min_blocks",
            )
        return self


class SGLangReserveConfig(Section):
    """Reserve policy sglang: a new prompt is charged its clipped output, each decode a falling share of its own."""

    init: float = Field(0.7, ge=0, le=1, description="Share at start and after idling.")
    min_factor: float = Field(0.14, ge=0, le=1, description="The share falls no lower than min_factor * init.")
    decay_steps: int = Field(600, ge=1, le=1 << 30, description="Decode steps from init to the lowest share.")
    retract_decode_steps: int = Field(
        20, ge=1, le=1 << 20, description="A preemption frees room for so many tokens of every decode that stays."
    )
    clip_max_new_tokens: int = Field(
        4096, ge=1, le=1 << 22, description="A request counts with at most so many tokens to come."
    )


class SchedulerConfig(Section):
    """What enters a step, what is kept free for running requests, and who gives way when blocks run out."""

    max_num_batched_tokens: int = Field(2048, ge=1, le=1 << 22, description="Tokens one step may compute.")
    max_num_seqs: int = Field(64, ge=1, le=65536, description="Requests that may run on a node at once.")
    prefill_policy: Literal["dedicated", "shared"] = Field(
        "dedicated", description="Scheduler of prefill nodes; shared: the one of decode nodes, for comparison."
    )
    prefill_order: Literal["fifo", "shortest_first"] = Field(
        "shortest_first",
        description="Which prompt is computed next; shortest_first: the one with fewest tokens still to compute, "
        "without those in the prefix cache.",
    )
    prefill_overtake_tokens: int = Field(
        16384,
        ge=0,
        le=1 << 30,
        description="At most so many prompt tokens that came later go before a prompt: shorter prompts here, and "
        "reservations on decode nodes; with max_num_batched_tokens or fewer, shortest_first is the order of arrival.",
    )
    reserve_policy: Literal["new_token_ratio", "fixed_blocks", "sglang", "none"] = Field(
        "new_token_ratio", description="How much of the pool is kept for running requests when one is admitted."
    )
    new_token_ratio: NewTokenRatioConfig = Field(default_factory=NewTokenRatioConfig)
    fixed_blocks: FixedBlocksConfig = Field(default_factory=FixedBlocksConfig)
    sglang: SGLangReserveConfig = Field(default_factory=SGLangReserveConfig)
    watermark: float = Field(
        0.01, ge=0, lt=1, description="Share of the pool that stays free when a request is admitted."
    )
    preemption_order: Literal["latest_first", "shortest_output_first"] = Field(
        "latest_first", description="Which decoding request gives up its blocks first."
    )
    requeue: Literal["front", "tail"] = Field(
        "front", description="Where a preempted request waits among those of its priority."
    )
    enable_priority_scheduling: bool = Field(
        False,
        description="Admit by the requests' priority (lower is sooner) and let an urgent prompt preempt a decode.",
    )
    priority_aging_s: float = Field(
        10.0, gt=0, le=86400, description="Seconds of waiting that raise a request by one level of priority."
    )


class SpeculativeConfig(Section):
    """Tokens guessed ahead and verified in one step; the output is distributed exactly as without."""

    method: Literal["none", "naive", "ngram"] = Field(
        "none", description="naive: the speculative path with no guesses; ngram: guesses from the text so far."
    )
    num_speculative_tokens: int = Field(4, ge=1, le=64, description="Guesses per request and step.")
    ngram_min: int = Field(2, ge=1, le=64, description="Shortest run of tokens looked up.")
    ngram_max: int = Field(4, ge=1, le=64, description="Longest run of tokens looked up.")

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.ngram_min > self.ngram_max:
            raise refuse(f"{self.ngram_min} is above ngram_max ({self.ngram_max})", "ngram_min")
        return self


LinkKind = Literal["cuda", "shm", "ipc", "tcp"]
"""The kinds of link there are (``cache_messager/links``), the fastest first."""

LINK_KINDS: tuple[LinkKind, ...] = get_args(LinkKind)

_LINK_CHOICES: dict[str, tuple[LinkKind, ...]] = {"auto": LINK_KINDS, "zmq": ("ipc", "tcp"), "shm": ("shm", "ipc")}


class TransferConfig(Section):
    """How KV gets from prefill to decode nodes."""

    link: LinkKind | Literal["auto", "zmq"] = Field(
        "auto",
        description="auto: the fastest that is possible: cuda or shm on the same host, else tcp; cuda: from device to"
        " device; shm: ipc where the pool cannot be mapped; zmq: ipc on the same host, else tcp.",
    )
    layerwise: bool = Field(True, description="Send each layer as soon as it is computed, not all at the end.")
    checksum: bool = Field(True, description="Verify an xxh3 digest of every frame.")
    lease_s: float = Field(
        30.0, gt=0, le=3600, description="Seconds a reservation lives without a word from its prefill node."
    )
    timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds without progress after which a transfer has failed."
    )
    max_inflight_bytes: SizeBytes = Field(
        64 << 20,
        ge=1 << 16,
        le=1 << 40,
        description="KV a decode node lets each sender have under way, in bytes (also 64MiB).",
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
"""The backends that keep blocks."""

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
    """Where KV blocks go that leave a pool, and come back from."""

    backend: Literal["none", "memory", "file", "redis", "mooncake"] = Field(
        "none", description="none: KV that leaves the pool is computed again; memory: kept by this process alone."
    )
    path: str = Field(
        ".kvrelay/kv", min_length=1, description="file, and redis with payload owner: directory, shared by the host."
    )
    capacity: SizeBytes = Field(
        8 << 30, ge=1 << 16, le=1 << 50, description="Room for KV that this node, or host (file), gives; also 8GiB."
    )
    url: SecretStr | None = Field(
        None, description="redis: redis://, rediss:// or unix:// with password and database; a cluster: any node of it."
    )
    ttl_s: int = Field(86400, ge=1, le=1 << 30, description="redis: seconds a block is kept after its last use.")
    payload: Literal["redis", "owner"] = Field(
        "redis", description="redis: KV in Redis; owner: KV in path on the host that wrote it, Redis knows where."
    )
    master: str = Field(
        "127.0.0.1:50051",
        pattern=r"^[A-Za-z0-9._-]+:[0-9]{1,5}$",
        description="mooncake: host:port of the master.",
    )
    timeout_s: float = Field(
        2.0, gt=0, le=600, description="Seconds after which what is not read is computed, and not written is dropped."
    )
    read_timeout_s: float = Field(
        0.5, gt=0, le=600, description="Seconds a new prompt waits for its beginning to be read; then it is computed."
    )
    min_read_tokens: int = Field(
        64, ge=1, le=1 << 20, description="Shorter beginnings are computed: reading them would take longer."
    )
    staging: SizeBytes = Field(
        64 << 20, ge=1 << 16, le=1 << 40, description="Memory for KV on its way to the store; when full, KV is dropped."
    )
    write_policy: Literal["on_finish", "on_preempt", "off"] = Field(
        "on_finish",
        description="on_preempt: the KV of preempted requests is written; on_finish: of finished ones too; off: none.",
    )
    resume: Literal["storage", "recompute", "auto"] = Field(
        "auto", description="How preempted requests get their KV back; auto: whichever has been faster on this node."
    )

    @model_validator(mode="after")
    def _keys_of_the_backend(self) -> Self:
        foreign = self.model_fields_set - _STORAGE_KEYS_OF_ALL - _STORAGE_KEYS[self.backend]
        if self.backend != "none" and foreign:
            raise refuse(f"{self.backend} has no use for {', '.join(sorted(foreign))}", "backend")
        if self.backend == "redis" and (self.url is None or not self.url.get_secret_value().startswith(_REDIS_SCHEMES)):
            raise refuse(f"redis needs a url that begins with {', '.join(_REDIS_SCHEMES)}", "url")
        return self


class RegistryConfig(Section):
    """How routers and nodes find each other."""

    kind: Literal["static", "redis"] = Field(
        "static",
        description="static: nodes reach one router at router.control; redis: nodes publish themselves to any number.",
    )
    url: SecretStr | None = Field(
        None, description="redis: redis://, rediss:// or unix:// with password and database; a cluster: any node of it."
    )
    cluster: str = Field(
        "default",
        max_length=64,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="redis: which nodes and routers belong together; one Redis may serve several clusters.",
    )
    lease_s: float = Field(
        10.0, ge=0.1, le=3600, description="redis: seconds after which a node that died is out of the registry."
    )

    @model_validator(mode="after")
    def _redis_has_a_url(self) -> Self:
        if self.kind == "redis" and (self.url is None or not self.url.get_secret_value().startswith(_REDIS_SCHEMES)):
            raise refuse(f"redis needs a url that begins with {', '.join(_REDIS_SCHEMES)}", "url")
        return self


class FakeEngineConfig(Section):
    """The engine without a model: tokens from a hash of the context, steps that take as long as these numbers say."""

    vocab_size: int = Field(1024, ge=2, le=1 << 24, description="Tokens are drawn from 0 to vocab_size - 1.")
    max_model_len: int = Field(32768, ge=1, le=1 << 22, description="Longest sequence, in tokens.")
    num_layers: int = Field(4, ge=1, le=1024, description="Layers of the KV cache.")
    num_kv_heads: int = Field(2, ge=1, le=1024, description="KV heads per layer.")
    head_dim: int = Field(8, ge=1, le=4096, description="Elements per KV head.")
    step_s: float = Field(0.0, ge=0, le=60, description="Seconds every step takes.")
    prefill_token_s: float = Field(0.0, ge=0, le=60, description="Seconds per token of a prompt chunk.")
    decode_token_s: float = Field(0.0, ge=0, le=60, description="Seconds per decoding request.")
    context_token_s: float = Field(0.0, ge=0, le=60, description="Seconds per token of context attended to.")
    eos_every: int = Field(
        256, ge=0, le=1 << 32, description="About one token in so many is an end-of-sequence; 0: none."
    )
    broken_token: int | None = Field(
        None, ge=0, le=1 << 24, description="A sequence with this token fails, as one whose embedding is not finite."
    )
    max_plans_in_flight: int = Field(
        1, ge=1, le=2, description="Steps planned before the first of them is done; 2: as for a device with a queue."
    )
    device_pool: bool = Field(
        False, description="Have the KV pool on a simulated device, so that transfer.link: cuda works without a GPU."
    )


class EngineConfig(Section):
    """What computes the steps."""

    kind: Literal["paddle", "torch", "fake"] = Field(
        "paddle",
        description="paddle: the model on Paddle; torch: on torch and Triton, needs the extra; fake: no model, tests.",
    )
    device: Literal["cpu", "gpu"] = Field("cpu", description="Where the engine computes; torch on a cpu is for tests.")
    kernels: Literal["auto", "native", "portable"] = Field(
        "auto",
        description="portable: Paddle's own operators; native: the CPU's best; auto: native where it is installed.",
    )
    quantization: Literal["none", "w8a8", "w8a16"] = Field(
        "none",
        description="Linear layers: none: as in model.dtype; w8a16: weights in int8; w8a8: what they multiply as well.",
    )
    fake: FakeEngineConfig = Field(default_factory=FakeEngineConfig)


class ClusterSettings(Section):
    """Liveness and the life of the processes."""

    heartbeat_s: float = Field(1.0, gt=0, le=60, description="Seconds between heartbeats.")
    peer_timeout_s: float = Field(5.0, gt=0, le=3600, description="Seconds of silence after which a peer is lost.")
    drain_timeout_s: float = Field(
        30.0, ge=0, le=86400, description="Seconds running requests may take to finish when a process is told to end."
    )
    start_timeout_s: float = Field(
        600.0, gt=0, le=86400, description="Seconds the cluster may take to become ready, checkpoints included."
    )
    restart_backoff_s: float = Field(
        0.5, gt=0, le=3600, description="Seconds before a crashed process is started again; doubles with each crash."
    )
    restart_backoff_max_s: float = Field(30.0, gt=0, le=3600, description="The longest such wait, in seconds.")
    max_crashes: int = Field(
        3,
        ge=1,
        le=1000,
        description="Crashes in a row, before it is ready or by a fault of its code (SIGILL, SIGSEGV, SIGBUS, SIGFPE, "
        "SIGABRT), after which a process is not started again and the cluster ends.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")

    @model_validator(mode="after")
    def _timeout_above_heartbeat(self) -> Self:
        if self.peer_timeout_s <= self.heartbeat_s:
            raise refuse(
                f"{self.peer_timeout_s} is not above heartbeat_s ({self.heartbeat_s}): every peer would be lost",
                "peer_timeout_s",
            )
        return self
