"""What a recording of a node has, and how its machine is made again from it."""

from __future__ import annotations

import json
from typing import Self

import msgspec

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.machine.contract import CoreEvent
from kvrelay.protocol.ids import Attempt
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.recording.event_codec import EventCodec

NODE_EVENTS = EventCodec(CoreEvent, Attempt)

_SECTIONS = ("cache", "scheduler", "speculative", "transfer", "storage", "kv_events", "registry", "cluster")
"""Those that a node's machine reads."""

_NO_URL = "redis://left-out"


class NodeStart(msgspec.Struct, frozen=True):
    """What a node's machine was made from. ``config``: JSON, without secrets and without what no machine reads."""

    config: str
    registration: Register
    max_plans_in_flight: int

    @classmethod
    def of(cls, node: NodeConfig, registration: Register, max_plans_in_flight: int) -> Self:
        """Describe the machine of ``node``."""
        # Without defaults: some sections refuse keys that their kind does not use.
        read = node.model_dump(mode="json", include={"name", "role", "port", *_SECTIONS}, exclude_unset=True)
        for section in ("storage", "registry"):
            if read.get(section, {}).get("url") is not None:
                read[section]["url"] = _NO_URL
        return cls(json.dumps(read), registration, max_plans_in_flight)

    @property
    def node(self) -> NodeConfig:
        """The config. Raises ValueError if it is not valid."""
        return NodeConfig.model_validate_json(self.config)
