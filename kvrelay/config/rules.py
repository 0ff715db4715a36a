"""Rules between config keys.

The rules read the data before its types are checked, so that one run reports all mistakes. They skip values of a wrong
type, which the type check reports.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from pydantic import BaseModel

from kvrelay.addresses import check_host, is_loopback, loopback_like, netloc, split_tcp_address
from kvrelay.config.base import Section
from kvrelay.config.document import Key
from kvrelay.config.scheduling import SchedulerConfig
from kvrelay.config.sections import DEVICE_ENGINES, CacheConfig, EngineConfig, ModelConfig, Role, RouterConfig
from kvrelay.config.storage import STORED_BACKENDS

Problem: TypeAlias = tuple[Key, str]

RESERVED_NAMES = ("router", "messager")

_EQUAL_ON_ALL_NODES: tuple[tuple[str, str, type[Section]], ...] = (
    ("cache", "block_size", CacheConfig),
    ("cache", "dtype", CacheConfig),
    ("model", "served_name", ModelConfig),
    ("engine", "deterministic", EngineConfig),
)


def inconsistencies(data: dict[str, Any]) -> list[Problem]:
    """Return every violated rule, with the key to change."""
    nodes = data.get("nodes", [])
    if not isinstance(nodes, list):
        return []
    known = [(index, node) for index, node in enumerate(nodes) if isinstance(node, dict)]
    rules: tuple[Callable[[dict[str, Any], list[tuple[int, dict[str, Any]]]], Iterator[Problem]], ...] = (
        _names,
        _addresses,
        _equal_keys,
        _budgets,
        _storage_needs_prefix_caching,
        _cuda_needs_pools_on_devices,
        _what_engines_compute,
        _other_hosts_need_keys,
        _ttft_limits_need_predictions,
    )
    problems = [problem for rule in rules for problem in rule(data, known)]
    # With a registry the other nodes of the cluster may be in other files.
    return problems if _get(data, "registry", "kind", "static") == "redis" else [*problems, *_roles(nodes)]


def suggestion(model: type[BaseModel], key: Key) -> str:
    """Return ``; did you mean ...?`` for an unknown key, else the list of known keys."""
    for part in key[:-1]:
        if isinstance(part, str):
            model = _model_of(model.model_fields[part].annotation)
    near = difflib.get_close_matches(str(key[-1]), list(model.model_fields), n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(model.model_fields))}"


def _model_of(annotation: Any) -> type[BaseModel]:
    """Return the section class in ``annotation``, which is one, or a tuple of one."""
    candidates = (annotation, *typing.get_args(annotation))
    return next(item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel))


def _names(_: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, node in nodes:
        name = node.get("name")
        if not isinstance(name, str):
            continue
        if name in seen:
            yield ("nodes", index, "name"), f"another node has the name {name}"
        if name in RESERVED_NAMES:
            yield ("nodes", index, "name"), f"{name} is reserved and cannot be the name of a node"
        seen.add(name)


def _addresses(data: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    router = data["router"] if isinstance(data.get("router"), dict) else {}
    host, port = router.get("host", "127.0.0.1"), router.get("port", RouterConfig().port)
    control = str(router.get("control", RouterConfig().control)).removeprefix("tcp://")
    taken = {netloc(str(host), port): "router.port"}
    if control in taken:
        yield ("router", "control"), f"{control} is also the address of router.port"
    taken[control] = "router.control"
    if "admin_port" in router:
        admin = netloc(str(router.get("admin_host") or loopback_like(str(host))), router["admin_port"])
        if admin in taken:
            yield ("router", "admin_port"), f"{admin} is also the address of {taken[admin]}"
        taken[admin] = "router.admin_port"
    for index, node in nodes:
        address = netloc(str(node.get("host", "127.0.0.1")), node.get("port"))
        if address in taken and "port" in node:
            yield ("nodes", index, "port"), f"{address} is also the address of {taken[address]}"
        taken.setdefault(address, f"node {node.get('name', index)}")
    for index, node in nodes:
        if "metrics_port" in node:
            host = str(node.get("metrics_host") or loopback_like(str(node.get("host", "127.0.0.1"))))
            address = netloc(host, node["metrics_port"])
            if address in taken:
                yield ("nodes", index, "metrics_port"), f"{address} is also the address of {taken[address]}"
            taken.setdefault(address, f"the metrics of node {node.get('name', index)}")
        for field in ("endpoint", "replay_endpoint"):
            endpoint = _get(node, "kv_events", field, _get(data, "kv_events", field, None))
            if not isinstance(endpoint, str):
                continue
            address = endpoint.removeprefix("tcp://")
            if address in taken:
                yield ("nodes", index, "kv_events", field), f"{address} is also the address of {taken[address]}"
            taken.setdefault(address, f"the KV events of node {node.get('name', index)}")


def _equal_keys(data: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    for section, field, model in _EQUAL_ON_ALL_NODES:
        default = model.model_fields[field].default
        shared = _get(data, section, field, default)
        values = {index: _get(node, section, field, shared) for index, node in nodes}
        for index, value in values.items():
            if value != next(iter(values.values())):
                first = nodes[0][1].get("name", 0)
                yield (
                    ("nodes", index, section, field),
                    f"must be equal on all nodes: {value} here, {next(iter(values.values()))} on {first}",
                )


def _budgets(data: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    """A step computes one token of every decode, so the budget must cover max_num_seqs decodes."""
    fields = ("max_num_batched_tokens", "max_num_seqs")
    defaults = [SchedulerConfig.model_fields[field].default for field in fields]
    shared = [_get(data, "scheduler", field, default) for field, default in zip(fields, defaults, strict=True)]
    for index, node in nodes:
        budget, num_seqs = (_get(node, "scheduler", field, value) for field, value in zip(fields, shared, strict=True))
        if node.get("role") not in ("decode", "mixed") or not isinstance(budget, int) or not isinstance(num_seqs, int):
            continue
        if budget < num_seqs:
            yield (
                ("nodes", index, "scheduler", "max_num_batched_tokens"),
                f"{budget} is below max_num_seqs ({num_seqs}): a step takes one token of every running decode",
            )


def _storage_needs_prefix_caching(data: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    """Stored blocks are found by their hash, and hashes are only used with prefix caching."""
    backend, caching = _get(data, "storage", "backend", "none"), _get(data, "cache", "prefix_caching", True)
    for index, node in nodes:
        is_stored = _get(node, "storage", "backend", backend) in STORED_BACKENDS
        if is_stored and _get(node, "cache", "prefix_caching", caching) is False:
            yield (
                ("nodes", index, "cache", "prefix_caching"),
                "must be true with storage: blocks are stored by their hash",
            )


def _cuda_needs_pools_on_devices(data: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    """The link copies from device to device, and a node that has none would find out with its first request."""
    link, kind = _get(data, "transfer", "link", "auto"), _get(data, "engine", "kind", "paddle")
    for index, node in nodes:
        fakes = [fake for level in (data, node) if isinstance(fake := _get(level, "engine", "fake", None), dict)]
        is_simulated = any([fake["device_pool"] for fake in fakes if "device_pool" in fake][-1:])
        of_node = _get(node, "engine", "kind", kind)
        has_device_pool = of_node in DEVICE_ENGINES or (of_node == "fake" and is_simulated)
        if _get(node, "transfer", "link", link) == "cuda" and not has_device_pool:
            yield (
                ("nodes", index, "transfer", "link"),
                "cuda copies between pools of device engines: engine.kind torch, paddle-device",
            )


def _what_engines_compute(data: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    """Quantization and determinism depend on the kind of engine."""
    fields = ("kind", "device", "quantization", "deterministic")
    shared = [_get(data, "engine", field, EngineConfig.model_fields[field].default) for field in fields]
    for index, node in nodes:
        kind, device, quantization, is_deterministic = (
            _get(node, "engine", field, value) for field, value in zip(fields, shared, strict=True)
        )
        key = ("nodes", index, "engine")
        if quantization == "fp8" and kind != "torch":
            yield (*key, "quantization"), f"fp8 needs engine.kind: torch, not {kind}"
        if quantization in ("w8a8", "w8a16") and kind in DEVICE_ENGINES:
            yield (*key, "quantization"), f"{quantization} is not for engine.kind: {kind}"
        if is_deterministic is True and not (kind in DEVICE_ENGINES and device == "gpu"):
            reason = "" if kind != "paddle" else ": engine.kernels: native of paddle needs no such mode"
            yield (*key, "deterministic"), f"true needs engine.kind: torch and engine.device: gpu{reason}"
        if is_deterministic is True and quantization == "fp8":
            yield (*key, "deterministic"), "true is not for quantization: fp8, whose sums may depend on the batch"


def _other_hosts_need_keys(data: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    """Without keys whoever reaches a port of a process can act as any other process."""
    advice = "can be reached from other hosts: set security.keys (kvrelay keys init), or security.insecure: true"
    keys, insecure = _get(data, "security", "keys", None), _get(data, "security", "insecure", False)
    control = _get(data, "router", "control", RouterConfig().control)
    is_static = _get(data, "registry", "kind", "static") == "static"
    if is_static and not keys and not insecure and isinstance(control, str) and not _is_local(control):
        yield ("router", "control"), f"{control} {advice}"
    for index, node in nodes:
        host = node.get("host", "127.0.0.1")
        is_secured = _get(node, "security", "keys", keys) or _get(node, "security", "insecure", insecure)
        if isinstance(host, str) and not _is_local(host) and not is_secured:
            yield ("nodes", index, "host"), f"{host} {advice}"


def _ttft_limits_need_predictions(data: dict[str, Any], nodes: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    """Only one policy predicts the time to first token, and another would send the request elsewhere."""
    policy = _get(data, "router", "prefill_routing", RouterConfig.model_fields["prefill_routing"].default)
    if _get(data, "router", "ttft_slo_s", None) is not None and policy != "ttft":
        yield ("router", "ttft_slo_s"), f"needs prefill_routing: ttft, not {policy}"


def _is_local(address: str) -> bool:
    """Return whether ``address``, a host or ``tcp://host:port``, can only be reached from this host.

    True also for an invalid address, which the check of types reports.
    """
    try:
        host = split_tcp_address(address)[0] if address.startswith("tcp://") else address
        check_host(host)
    except ValueError:
        return True
    return is_loopback(host)


def _get(data: dict[str, Any], section: str, field: str, default: object) -> object:
    keys = data.get(section)
    return keys.get(field, default) if isinstance(keys, dict) else default


def _roles(nodes: list[Any]) -> Iterator[Problem]:
    roles = [node.get("role") if isinstance(node, dict) else None for node in nodes]
    if not nodes:
        yield ("nodes",), "no node can serve: add a mixed node, or a prefill and a decode node"
    if not all(role in list(Role) for role in roles):
        return
    for role, partner in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        if role in roles and partner not in roles:
            yield ("nodes",), f"a {role} node needs a {partner} node, and there is none"
