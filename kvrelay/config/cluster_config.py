"""The cluster config: one YAML file that every process of a cluster reads.

``ClusterConfig.load`` gives a checked, immutable config or a ConfigError that lists every problem with its place.
``cluster.node(name)`` has every section as it is on that node: a node's own keys go before the cluster's.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationError

from kvrelay.addresses import loopback_like, tcp_address
from kvrelay.config.base import Host, Port, Section
from kvrelay.config.document import Document, Key
from kvrelay.config.faults import FaultsConfig
from kvrelay.config.kv_events import KVEventsConfig
from kvrelay.config.recording import RecordingConfig
from kvrelay.config.rules import inconsistencies, suggestion
from kvrelay.config.scheduling import (
    FixedBlocksConfig,
    NewTokenRatioConfig,
    SchedulerConfig,
    SGLangReserveConfig,
    SpeculativeConfig,
)
from kvrelay.config.sections import (
    CacheConfig,
    ClusterSettings,
    EngineConfig,
    FakeEngineConfig,
    ModelConfig,
    RegistryConfig,
    Role,
    RouterConfig,
    SecurityConfig,
    TransferConfig,
)
from kvrelay.config.storage import StorageConfig
from kvrelay.errors import ConfigError

__all__ = [
    "CacheConfig",
    "ClusterConfig",
    "ClusterSettings",
    "EngineConfig",
    "FakeEngineConfig",
    "FixedBlocksConfig",
    "KVEventsConfig",
    "ModelConfig",
    "NewTokenRatioConfig",
    "NodeConfig",
    "RegistryConfig",
    "Role",
    "RouterConfig",
    "SGLangReserveConfig",
    "SchedulerConfig",
    "SecurityConfig",
    "SpeculativeConfig",
    "StorageConfig",
    "TransferConfig",
]


OVERRIDES = "KVRELAY_OVERRIDES"
"""Environment variable with overrides as a JSON list of texts ``KEY=VALUE``."""


class Sections(Section):
    """The sections of the cluster. Each node may override keys of all of them."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig = Field(default_factory=SpeculativeConfig)
    transfer: TransferConfig = Field(default_factory=TransferConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    kv_events: KVEventsConfig = Field(default_factory=KVEventsConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    recording: RecordingConfig = Field(default_factory=RecordingConfig)
    registry: RegistryConfig = Field(default_factory=RegistryConfig)
    security: SecurityConfig = Field(default_factory=SecurityConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)


class NodeConfig(Sections):
    """One node with its sections: the node's own keys, then the cluster's."""

    name: str = Field(
        min_length=1, max_length=32, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="Name of the node, unique."
    )
    role: Role = Field(strict=False, description="prefill, decode, or mixed (both, alone).")
    host: Host = Field("127.0.0.1", description="Address the node listens on and others reach it at.")
    port: Port = Field(description="Port the node listens on for other nodes.")
    metrics_port: Port | None = Field(
        None, description="Port of the node's own /metrics for Prometheus (HTTP, without keys); default: none."
    )
    metrics_host: Host | None = Field(
        None, description="Address of metrics_port. Default: 127.0.0.1, or ::1 if host is an IPv6 address."
    )
    threads: int = Field(1, ge=1, le=1024, description="Threads the engine computes with.")
    cpus: tuple[int, ...] | None = Field(
        None, min_length=1, strict=False, description="CPUs the node's processes are pinned to; default: not pinned."
    )

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host and port of the node's ``/metrics``, or None."""
        if self.metrics_port is None:
            return None
        return self.metrics_host or loopback_like(self.host), self.metrics_port

    @property
    def address(self) -> str:
        """The address of this node for other processes."""
        return tcp_address(self.host, self.port)


class ClusterConfig(Sections):
    """The whole config file."""

    nodes: tuple[NodeConfig, ...] = Field(default=(), strict=False, description="The nodes of the cluster.")
    _warnings: tuple[str, ...] = PrivateAttr(())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Deprecated keys in the file, as lines ``file:line: key: what to do``."""
        return self._warnings

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = (), env: Mapping[str, str] = os.environ) -> Self:
        """Read ``path``, overridden by ``env`` (``KVRELAY_ROUTER__PORT=1``) and then ``overrides`` (``router.port=1``).

        Overrides in ``KVRELAY_OVERRIDES`` (a JSON list) come before ``overrides``: ``kvrelay up`` gives its own to its
        processes there, because all users can see arguments.
        Raises ConfigError with every problem found, one line each: ``file:line: key: what is wrong``.
        """
        document = Document.read(Path(path))
        document.apply_env(env)
        document.apply_overrides([*json.loads(env.get(OVERRIDES, "[]")), *overrides])
        return cls._from_document(document, Path(path).parent)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """Check ``data``, the content of a config file. Raises ConfigError as ``load`` does."""
        return cls._from_document(Document("config", copy.deepcopy(data)), Path.cwd())

    @classmethod
    def _from_document(cls, document: Document, config_dir: Path) -> Self:
        for section, old, new in _RENAMED:
            document.rename(section, old, new)
        config: Self | None = None
        found: list[tuple[Key, str]] = []
        try:
            config = cls.model_validate(document.resolved(list(Sections.model_fields)))
        except ValidationError as error:
            found = _field_problems(error, document)
        found += inconsistencies(document.data)
        problems = [*document.problems, *(document.describe(key, reason) for key, reason in found)]
        if problems or config is None:
            raise ConfigError(sorted(problems, key=_in_reading_order))
        config._warnings = tuple(document.warnings)
        return config._with_absolute_paths(config_dir)

    def _with_absolute_paths(self, config_dir: Path) -> Self:
        """Return the config with absolute paths of model and keys, so that a process may run in any directory."""
        nodes = tuple(node.model_copy(update=_located_sections(node, config_dir)) for node in self.nodes)
        return self.model_copy(update={**_located_sections(self, config_dir), "nodes": nodes})

    def node(self, name: str) -> NodeConfig:
        """Return the node called ``name``. Raises ConfigError if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ConfigError([f"no node is called {name!r}; there are {', '.join(node.name for node in self.nodes)}"])


_RENAMED = (
    ("router", "prefill_policy", "prefill_routing"),
    ("router", "decode_policy", "decode_routing"),
)
"""(section, old name, new name) of renamed keys. The old name is accepted for one minor version."""


def _in_reading_order(problem: str) -> list[str]:
    """Sort ``file:9:`` before ``file:10:``."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", problem)]


def _field_problems(error: ValidationError, document: Document) -> list[tuple[Key, str]]:
    """Return pydantic's errors, without those of keys that a node inherits from a section that is reported anyway."""
    problems: list[tuple[Key, str]] = []
    for item in error.errors(include_url=False):
        key: Key = (*item["loc"], *item.get("ctx", {}).get("key", ()))
        inherited = len(key) > 2 and key[0] == "nodes" and key[2] in Sections.model_fields and not document.has(key)
        if not inherited:
            problems.append((key, _reason(item["type"], item["msg"], key, document)))
    return problems


_SUBJECT = re.compile(r"^\w+ (?=should )")
"""The type name in pydantic's messages, which the key replaces."""

_REASONS = {
    "missing": "is missing",
    "too_short": "should not be empty",
    "model_type": "should hold keys, not {shown}",
    "tuple_type": "should be a list, not {shown}",
    "string_pattern_mismatch": "cannot be {shown}",
}


def _reason(kind: str, message: str, key: Key, document: Document) -> str:
    """Return the message for pydantic's error ``kind`` with ``message``."""
    if kind == "extra_forbidden":
        return "unknown key" + suggestion(ClusterConfig, key)
    if kind == "refused":
        return message
    otherwise = _SUBJECT.sub("", message) + ", not {shown}"
    return _REASONS.get(kind, otherwise).replace("{shown}", document.shown(key))


def _located_sections(sections: Sections, config_dir: Path) -> dict[str, Section]:
    """Return the sections that contain paths, with these located."""
    names = {"model": ("path",), "security": ("keys",), "router": ("api_keys_file", "tls_certificate", "tls_key")}
    return {
        name: section.model_copy(
            update={key: _located(path, config_dir) for key in keys if (path := getattr(section, key))}
        )
        for name, keys in names.items()
        if (section := getattr(sections, name))
    }


def _located(path: str, config_dir: Path) -> str:
    """Return ``path`` resolved against the current directory or, if it is missing there, the config file's."""
    here, there = Path(path).absolute(), (config_dir / path).absolute()
    return str(there if _exists(there) and not _exists(here) else here)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False
