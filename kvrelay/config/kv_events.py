"""The section ``kv_events`` of the cluster config."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from kvrelay.config.base import Section, TcpAddress, refuse


class KVEventsConfig(Section):
    """Events of a node's prefix cache, in vLLM's format (ZMQ). Each node needs addresses of its own."""

    endpoint: TcpAddress | None = Field(
        None,
        description="Address of the node's PUB socket, as tcp://127.0.0.1:5557; without keys. The events have the "
        "tokens of all prompts. Default: no events.",
    )
    replay_endpoint: TcpAddress | None = Field(
        None, description="Address of the node's ROUTER socket, which sends past events again; default: none."
    )
    topic: str | None = Field(
        None, max_length=512, description="Topic of the messages; default: kv@NODE@MODEL, with the served name."
    )
    buffer_batches: int = Field(
        10_000, ge=1, le=1_000_000, description="Batches kept for replay_endpoint, at most 64 MiB."
    )
    hwm: int = Field(
        1000, ge=1, le=1_000_000, description="Messages queued per subscriber; beyond, a slow one loses some."
    )

    @model_validator(mode="after")
    def _replay_needs_events(self) -> Self:
        if self.replay_endpoint is not None and self.endpoint is None:
            raise refuse("needs kv_events.endpoint", "replay_endpoint")
        return self
