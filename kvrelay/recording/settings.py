"""Settings of a recording. Imports no pydantic: a messager has them too."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    from kvrelay.config.cluster_config import Sections

_NOT_FOR_NAMES = re.compile(r"[^A-Za-z0-9._]+")


class RecordingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The section ``recording`` of the config.

    ``cluster``: the name of the cluster, for a directory of its own: processes of several clusters have equal names.
    """

    max_bytes: int = 4 << 20
    actions: bool = False
    prompts: bool = False
    directory: str | None = None
    cluster: str = "cluster"

    @classmethod
    def of(cls, config: Sections) -> Self:
        """Return the settings in ``config``, which are the same for the router and the nodes of a cluster."""
        return cls(
            max_bytes=config.recording.max_bytes,
            actions=config.recording.actions,
            prompts=config.recording.prompts,
            directory=config.recording.directory,
            cluster=cluster_name(config),
        )


def cluster_name(config: Sections) -> str:
    """Return a name for the cluster of ``config`` that is a file name: no other at the same time on this host has it.

    It is ``registry.cluster`` with a Redis registry, else from ``router.control``: ``127.0.0.1-8100``.
    """
    if config.registry.kind == "redis":
        return config.registry.cluster.lstrip(".") or "cluster"
    address = config.router.control.partition("://")[2]
    return _NOT_FOR_NAMES.sub("-", address).strip("-.") or "cluster"
