"""Settings passed to a messager at its start."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from kvrelay.config.self_check_mode import SelfCheckMode
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import PeerId, messager_of
from kvrelay.protocol.kv_handle import KVHandle
from kvrelay.recording.settings import RecordingSettings
from kvrelay.runtime.message_faults import MessageFaults

if TYPE_CHECKING:  # the messager's process does not need pydantic and starts faster without it
    from kvrelay.config.cluster_config import NodeConfig


class MessagerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a messager.

    ``me``: its peer id. ``node``: the peer id of its node, which listens at ``node_address``. ``pool``: handle of the
    node's KV memory. ``links``: kinds of link for sending, best first. ``runtime_dir``: directory of link files.
    ``cpus``: CPUs it may run on, all by default, so that a messager does not compete with a pinned node. The rest is
    from the config's sections ``transfer``, ``cluster`` and ``security``.
    """

    me: PeerId
    node: PeerId
    node_address: str
    geometry: KVGeometry
    pool: KVHandle
    host: str
    runtime_dir: str
    cpus: list[int] | None = None
    links: tuple[str, ...] = ("shm", "ipc", "tcp")
    layerwise: bool = True
    checksum: bool = True
    timeout_s: float = 60.0
    max_inflight_bytes: int = 64 << 20
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 5.0
    log_level: str = "info"
    log_format: Literal["auto", "text", "json"] = "auto"
    keys: str | None = None
    self_check: SelfCheckMode = "report"
    faults: MessageFaults | None = None
    recording: RecordingSettings = RecordingSettings()

    @classmethod
    def for_node(
        cls,
        config: NodeConfig,
        *,
        node: PeerId,
        node_address: str,
        geometry: KVGeometry,
        pool: KVHandle,
        runtime_dir: str,
    ) -> MessagerSettings:
        """Return the settings of the messager of ``node``, an incarnation of the node in ``config``."""
        return cls(
            me=messager_of(node),
            node=node,
            node_address=node_address,
            geometry=geometry,
            pool=pool,
            host=config.host,
            runtime_dir=runtime_dir,
            links=config.transfer.link_kinds,
            layerwise=config.transfer.layerwise,
            checksum=config.transfer.checksum,
            timeout_s=config.transfer.timeout_s,
            max_inflight_bytes=config.transfer.max_inflight_bytes,
            heartbeat_s=config.cluster.heartbeat_s,
            peer_timeout_s=config.cluster.peer_timeout_s,
            log_level=config.cluster.log_level,
            log_format=config.cluster.log_format,
            keys=config.security.keys,
            self_check=config.cluster.self_check,
            faults=MessageFaults.of(config.faults),
            recording=RecordingSettings.of(config),
        )


def host_id() -> str:
    """Return an id that two processes share only if they see the same files, processes and memory.

    Containers have their own host names and namespaces, so messagers in different containers use tcp.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespaces = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("mnt", "pid")]
    return hashlib.sha256("\n".join([boot_id, socket.gethostname(), *namespaces]).encode()).hexdigest()[:32]
