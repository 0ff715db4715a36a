"""The sections of the cluster config: every key with its type, bounds, default and unit.

``kvrelay.config.scheduling`` has ``scheduler`` and ``speculative``, ``kvrelay.config.storage`` has ``storage``. The
configuration reference and ``kvrelay config schema`` are generated from these classes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self, TypeAlias, get_args

from pydantic import Field, SecretStr, model_validator

from kvrelay.addresses import loopback_like, netloc
from kvrelay.config.base import REDIS_SCHEMES, DType, Host, Port, Section, SizeBytes, TcpAddress, refuse
from kvrelay.config.self_check_mode import SelfCheckMode
from kvrelay.errors import ConfigError

_ADMIN_PORT_OFFSET = 90
"""Two routers on one host, at ports of their own, need not be told of two more."""

_MAX_PORT = 65535


class Role(StrEnum):
    """What a node does."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


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
        description="dummy: random weights made on the device, of the shape in config.json; device engines only.",
    )
    max_model_len: int | None = Field(
        None, ge=1, le=1 << 22, description="Maximum prompt plus output, in tokens; default: the checkpoint's."
    )

    @property
    def name(self) -> str:
        """The model name for clients."""
        return self.served_name or self.path.rstrip("/").rpartition("/")[2]


RoutingPolicy: TypeAlias = Literal[
    "least_loaded", "cache_aware", "ttft", "session", "round_robin", "random", "power_of_two"
]
"""Policies that choose a request's nodes (``router/policies.py``)."""


ToolFormat: TypeAlias = Literal["auto", "none", "hermes", "llama3", "mistral", "pythonic"]
"""Formats of tool calls (``router/tools``)."""

ReasoningFormat: TypeAlias = Literal["auto", "none", "think"]
"""Formats of reasoning (``router/tools/reasoning.py``)."""


class RouterConfig(Section):
    """The router: its HTTP address for clients, its control address for nodes, and its limits."""

    host: Host = Field(
        "127.0.0.1",
        description="Address of the HTTP server; :: (with IPv6) means all IPv4 and IPv6 addresses.",
    )
    port: Port = Field(8000, description="Port of the HTTP server.")
    workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that serve clients: HTTP, chat templates, tokens, text. 1: the router itself; more: "
        "as many processes, started by the router, which keeps the nodes and the state of requests.",
    )
    admin_host: Host | None = Field(
        None,
        description="Address of the operators' HTTP server; other than loopback it needs a key. Default: 127.0.0.1, or "
        "::1 if host is an IPv6 address.",
    )
    admin_port: Port | None = Field(
        None, description="Port of the operators' HTTP server; default: 90 above port (below it, beyond 65535)."
    )
    admin_key_file: str | None = Field(
        None,
        min_length=1,
        description="File with the operators' key; default: the variable KVRELAY_ADMIN_KEY, or no key on loopback.",
    )
    control: TcpAddress = Field(
        "tcp://127.0.0.1:8100",
        description="registry static: address at which the router listens for nodes, as tcp://host:port (IPv6: "
        "tcp://[::1]:8100).",
    )
    prefill_routing: RoutingPolicy = Field(
        "cache_aware",
        description="Policy that chooses the prefill or mixed node of a request. least_loaded: the least wait for all; "
        "cache_aware: the same, but counts only prompt tokens that are not in the node's prefix cache; ttft: the least "
        "predicted time to first token, from measured speeds; session: one "
        "node for all requests with the same X-Session-ID (or X-Session-Token) header; round_robin; random; "
        "power_of_two: the less loaded of two random nodes.",
    )
    decode_routing: RoutingPolicy = Field(
        "cache_aware", description="Policy that chooses the decode node of a request, as prefill_routing."
    )
    ttft_slo_s: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="With prefill_routing ttft: requests get 429 if a longer time to first token is predicted, in "
        "seconds; a request's x-llm-d-slo-ttft-ms header replaces it; null: no limit.",
    )
    local_prefill_tokens: int | None = Field(
        None,
        ge=0,
        le=1 << 30,
        description="Threshold of conditional disaggregation, in prompt tokens: a decode node with room computes a "
        "prompt itself if every prefill node has at least this many more prompt tokens to compute than it has, or if "
        "there is no prefill node; null: off.",
    )
    tool_parser: ToolFormat = Field(
        "auto",
        description="Format in which the model writes tool calls. auto: the one that its chat template shows; hermes: "
        '<tool_call>{"name": ..., "arguments": {...}}</tool_call> (Hermes, Qwen); llama3: {"name": ..., "parameters": '
        "{...}}; mistral: [TOOL_CALLS]; pythonic: [f(a=1), g()].",
    )
    reasoning_parser: ReasoningFormat = Field(
        "auto",
        description="Format in which the model writes its reasoning. think: <think>...</think> before the answer; "
        "auto: think if the chat template has <think>.",
    )
    max_queued_requests: int = Field(
        512, ge=1, le=1_000_000, description="Maximum requests admitted and not finished; more get 429."
    )
    max_attempts: int = Field(3, ge=1, le=100, description="Maximum attempts at a request before its error is final.")
    node_wait_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds a request waits for a node if none can take it and one may come: a node left, or the "
        "router started, no longer ago.",
    )
    stream_interval: int = Field(
        1,
        ge=1,
        le=1 << 20,
        description="Fewest new tokens of a chunk of a stream, except for the first and the last. A busy router sends "
        "fewer and larger chunks anyway.",
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
        "at least max_body_bytes for each of workers, which share it equally; bodies beyond it get 503. Bodies up to "
        "16 KiB are always accepted.",
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
        2,
        ge=1,
        le=64,
        description="Maximum processes that prepare long bodies, but at least one per worker; started when needed.",
    )
    preparation_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds a worker may take to prepare a long body; then 503."
    )
    cors_allow_origins: tuple[str, ...] = Field(
        (), strict=False, description='Origins whose web pages may use the API; ["*"]: any; default: none.'
    )
    api_keys_file: str | None = Field(
        None,
        min_length=1,
        description="File with the clients' API keys, a line NAME KEY each, read again when it changes; default: the "
        "variable KVRELAY_API_KEYS, or no keys.",
    )
    key_max_requests: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Maximum requests in progress per API key; more get 429; default: no limit.",
    )
    key_tokens_per_minute: int | None = Field(
        None,
        ge=1,
        le=1 << 40,
        description="Tokens of prompts and answers per minute and API key; then 429; default: no limit.",
    )
    tls_certificate: str | None = Field(
        None,
        min_length=1,
        description="File with the HTTP server's certificate chain (PEM); default: HTTP without TLS.",
    )
    tls_key: str | None = Field(None, min_length=1, description="File with the private key of tls_certificate (PEM).")
    access_log: bool = Field(
        True, description="Log one line per HTTP request; probes such as /health only at log_level debug."
    )

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="URL of an OpenTelemetry collector that takes traces over HTTP, such as "
        "http://127.0.0.1:4318/v1/traces; needs kvrelay[otel]; default: no traces.",
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of requests that are traced, of those without a traceparent that decides."
    )

    @model_validator(mode="after")
    def _room_for_a_body(self) -> Self:
        share = self.max_total_body_bytes // self.workers
        if share < self.max_body_bytes:
            shared = f", shared by {self.workers} workers," if self.workers > 1 else ""
            raise refuse(
                f"{self.max_total_body_bytes}{shared} is below max_body_bytes ({self.max_body_bytes})",
                "max_total_body_bytes",
            )
        return self

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.tls_certificate is None) is not (self.tls_key is None):
            raise refuse(
                "tls_certificate and tls_key need each other", "tls_certificate" if self.tls_key else "tls_key"
            )
        return self

    @property
    def url(self) -> str:
        """Base URL of the HTTP server."""
        return f"{'https' if self.tls_certificate else 'http'}://{netloc(self.host, self.port)}"

    @property
    def admin_address(self) -> tuple[str, int]:
        """Host and port of the operators' HTTP server."""
        host = self.admin_host or loopback_like(self.host)
        if self.admin_port is not None:
            return host, self.admin_port
        above = self.port + _ADMIN_PORT_OFFSET
        return host, above if above <= _MAX_PORT else self.port - _ADMIN_PORT_OFFSET

    @property
    def admin_url(self) -> str:
        """Base URL of the operators' HTTP server."""
        return f"http://{netloc(*self.admin_address)}"


class CacheConfig(Section):
    """The KV pool of a node."""

    block_size: int = Field(16, ge=1, le=1024, description="Tokens per KV block; must be equal on all nodes.")
    num_blocks: Annotated[int, Field(ge=2, le=1 << 24)] | Literal["auto"] = Field(
        4096, description="KV blocks in the pool; auto (device engines on a GPU): as many as fit beside the model."
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
            raise ConfigError(
                ["cache.num_blocks: auto needs engine.kind: torch or paddle-device, and engine.device: gpu"]
            )
        return self.num_blocks


LinkKind = Literal["cuda", "shm", "ipc", "nixl", "tcp"]
"""All kinds of link (``cache_messager/links``), the fastest first."""

LINK_KINDS: tuple[LinkKind, ...] = get_args(LinkKind)

_LINK_CHOICES: dict[str, tuple[LinkKind, ...]] = {"auto": LINK_KINDS, "zmq": ("ipc", "tcp"), "shm": ("shm", "ipc")}


class TransferConfig(Section):
    """KV transfer from prefill to decode nodes."""

    link: LinkKind | Literal["auto", "zmq"] = Field(
        "auto",
        description="Kind of link; auto: the fastest possible, which is cuda or shm on the same host (ipc if the pool "
        "cannot be mapped), else nixl if both nodes have the library (kvrelay[nixl]) and the sender an RDMA device, "
        "else tcp; cuda: from GPU memory to GPU memory on the same host; zmq: ipc on the same host, else tcp; shm: ipc "
        "if the pool cannot be mapped.",
    )
    layerwise: bool = Field(
        True, description="Send each layer when it is computed; off: send a prompt when all of it is computed."
    )
    checksum: bool = Field(True, description="ipc, tcp: verify a digest of every frame (xxh3); other kinds always do.")
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
        if self.kind == "redis" and (self.url is None or not self.url.get_secret_value().startswith(REDIS_SCHEMES)):
            raise refuse(f"redis needs a url that begins with {', '.join(REDIS_SCHEMES)}", "url")
        return self


class SecurityConfig(Section):
    """How the processes of a cluster know each other."""

    keys: str | None = Field(
        None,
        min_length=1,
        description="Directory of the keys of the processes (kvrelay keys init); default: no keys, and processes "
        "listen on this host only.",
    )
    insecure: bool = Field(
        False, description="Listen for processes on other hosts without keys: whoever reaches a port is trusted."
    )


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
    fatal_token: int | None = Field(
        None, ge=0, le=1 << 24, description="The step that computes this token fails like one that loses its device."
    )
    max_plans_in_flight: int = Field(
        1, ge=1, le=2, description="Plans in flight; 2: as a device with a queue of steps."
    )
    device_pool: bool = Field(
        False, description="Put the KV pool on a simulated device, so that transfer.link: cuda works without a GPU."
    )


DEVICE_ENGINES: dict[str, Literal["torch", "paddle"]] = {"torch": "torch", "paddle-device": "paddle"}
"""Values of ``engine.kind`` that mean the device engine, and the framework it runs on."""


class EngineConfig(Section):
    """The engine that computes the steps."""

    kind: Literal["paddle", "torch", "paddle-device", "fake"] = Field(
        "paddle",
        description="paddle: Paddle, for CPUs; torch: kernels for GPUs, on torch (needs the extra torch); "
        "paddle-device: the same kernels on Paddle's GPU build; fake: no model, for tests.",
    )
    device: Literal["cpu", "gpu"] = Field(
        "cpu", description="Device of the engine; torch and paddle-device on cpu are for tests."
    )
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

    @property
    def framework(self) -> Literal["torch", "paddle"] | None:
        """What the device engine runs on; None: it is another engine."""
        return DEVICE_ENGINES.get(self.kind)


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
    self_check: SelfCheckMode = Field(
        "report",
        description="Check of blocks, slots, sequences, transfers and reservations that each idle process makes of "
        "itself. report: log and count violations; fatal: the process ends with an error, for tests; off.",
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="Format of log lines; json: an object per line; auto: text on a terminal, else json."
    )

    @model_validator(mode="after")
    def _timeout_above_heartbeat(self) -> Self:
        if self.peer_timeout_s <= self.heartbeat_s:
            raise refuse(
                f"{self.peer_timeout_s} is not above heartbeat_s ({self.heartbeat_s}): every peer would be lost",
                "peer_timeout_s",
            )
        return self
