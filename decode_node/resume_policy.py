"""Whether a request's KV is read from the store or computed."""

from __future__ import annotations

from decode_node.request import DecodeRequest, DecodeStatus
from kvrelay.config.storage import StorageConfig
from kvrelay.machine.speed import Speed
from kvstore.offload.store_transfers import min_read_blocks


class ReloadPolicy:
    """Decides for a request that is being admitted. The caller reports ``reload_speed`` and ``prefill_speed``."""

    def __init__(self, config: StorageConfig, block_size: int) -> None:
        self._is_on = config.backend != "none"
        self._resume = config.resume
        self._min_blocks = min_read_blocks(config, block_size)
        self.reload_speed = Speed()
        self.prefill_speed = Speed()

    def waits(self, request: DecodeRequest) -> bool:
        """Return whether ``request`` must not be admitted yet: its KV is still being written, and is to be read."""
        return request.is_saving and self._resume == "storage"

    def num_blocks(self, request: DecodeRequest, num_matched: int, now: float) -> int:
        """Return how many blocks behind the first ``num_matched`` are to be read: all that may be there, or none."""
        if not self._is_on or request.is_saving:
            return 0
        num_stored = len(request.reusable_hashes)
        if request.status is DecodeStatus.PREEMPTED:
            num_stored = request.num_stored_blocks
            if self._resume == "recompute" or (self._resume == "auto" and self._computing_is_faster(now)):
                return 0
        num_blocks = num_stored - num_matched
        return num_blocks if num_blocks >= self._min_blocks else 0

    def _computing_is_faster(self, now: float) -> bool:
        reload_speed, prefill_speed = self.reload_speed.at(now), self.prefill_speed.at(now)
        return reload_speed is not None and prefill_speed is not None and prefill_speed > reload_speed
