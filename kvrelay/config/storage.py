"""The section ``storage`` of the config."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from kvrelay.addresses import NETLOC_PATTERN
from kvrelay.config.base import REDIS_SCHEMES, Section, SizeBytes, refuse

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
        if self.backend == "redis" and (self.url is None or not self.url.get_secret_value().startswith(REDIS_SCHEMES)):
            raise refuse(f"redis needs a url that begins with {', '.join(REDIS_SCHEMES)}", "url")
        return self
