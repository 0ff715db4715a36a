"""What tools read in scrapes of ``/metrics``: samples, and the state of a server as an inference gateway takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def families(text: str) -> dict[str, Metric]:
    """Return the families of a scrape by name; counters with ``_total``. Fails if a family is there twice."""
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name not in found, f"{name} is there twice"
        found[name] = family
    return found


def samples(text: str, name: str, **labels: str) -> list[Sample]:
    """Return the samples called ``name`` that have ``labels``."""
    return [sample for sample in all_samples(text) if sample.name == name and labels.items() <= sample.labels.items()]


def value(text: str, name: str, **labels: str) -> float:
    """Return the value of the one sample called ``name`` with ``labels``."""
    (sample,) = samples(text, name, **labels)
    return sample.value


def all_samples(text: str) -> Iterator[Sample]:
    """Yield every sample of a scrape."""
    for family in families(text).values():
        yield from family.samples


@dataclass(frozen=True)
class ServerState:
    """What a gateway knows of a server after a scrape. ``kv_usage`` is from 0 to 1."""

    num_waiting: int
    num_running: int
    kv_usage: float
    block_size: int
    num_blocks: int
    max_lora: int


def as_gateway(text: str) -> ServerState:
    """Return what the endpoint picker of an inference gateway takes from a scrape, by its rules.

    Each family must be there and be a gauge. Of several series it takes an arbitrary one, so there may be only one. The
    sizes of the cache are whole numbers in labels. Adapters are a list in a label, separated by commas.
    """
    found = families(text)
    cache = _only(found, "vllm:cache_config_info").labels
    lora = _only(found, "vllm:lora_requests_info")
    assert {"running_lora_adapters", "waiting_lora_adapters"} <= lora.labels.keys()
    assert lora.value > 0  # the time of the list: gateways take the newest
    usage = _only(found, "vllm:kv_cache_usage_perc").value
    assert 0.0 <= usage <= 1.0
    return ServerState(
        _whole(_only(found, "vllm:num_requests_waiting")),
        _whole(_only(found, "vllm:num_requests_running")),
        usage,
        int(cache["block_size"]),
        int(cache["num_gpu_blocks"]),
        int(lora.labels["max_lora"]),
    )


def _only(found: Mapping[str, Metric], name: str) -> Sample:
    family = found[name]
    assert family.type == "gauge"
    (sample,) = family.samples
    assert sample.name == name
    assert {"model_name", "engine"} <= sample.labels.keys()
    return sample


def _whole(sample: Sample) -> int:
    assert sample.value == int(sample.value) >= 0
    return int(sample.value)
