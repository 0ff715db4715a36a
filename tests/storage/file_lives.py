"""Writers that die: forks children that write to a ``file`` store until they are killed, or kill themselves in a write.

Started by test_file_crashes. Reads lines ``PATH NUM_BLOCKS SEED FATAL SHARE`` and forks a child for each: its write
number FATAL does only SHARE of its bytes and is the last; 0: it goes on until somebody kills it. Says the child's pid,
a dot for each put, and ``dead`` when it is.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from storage_rooms import GEOMETRY, HASHES, FileRoom, views

from kvstore.storage.interface import BlockView


def content_of(block_hash: bytes) -> BlockView:
    """Return what every writer stores as ``block_hash``."""
    rng = np.random.default_rng(int.from_bytes(block_hash[:8], "little"))
    return rng.integers(0, 256, (GEOMETRY.num_layers, 2, 1, GEOMETRY.plane_block_bytes), np.uint8)


def say(word: str) -> None:
    os.write(1, word.encode())


async def write_forever(path: Path, num_blocks: int, seed: int) -> None:
    """Put random sequences, as fast as it goes."""
    rng = random.Random(seed)
    store = FileRoom(path).store(num_blocks=num_blocks)
    await store.open()
    while True:
        start = rng.randrange(len(HASHES) - 40)
        block_hashes = HASHES[start : start + rng.randrange(1, 40)]
        await store.put(block_hashes, [views(content_of(block_hash))[0] for block_hash in block_hashes])
        say(".")


def die_in_write(fatal: int, share: float) -> None:
    """Let write number ``fatal`` of this process be its last, and be cut."""
    pwrite, count = os.pwrite, 0

    def counted(fd: int, data: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count == fatal:
            pwrite(fd, bytes(data)[: int(len(data) * share)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(fd, data, offset)

    os.pwrite = counted


def main() -> None:
    for line in sys.stdin:
        path, num_blocks, seed, fatal, share = line.split()
        child = os.fork()
        if child == 0:
            if int(fatal):
                die_in_write(int(fatal), float(share))
            asyncio.run(write_forever(Path(path), int(num_blocks), int(seed)))
        say(f"{child}\n")
        os.waitpid(child, 0)
        say("dead\n")


if __name__ == "__main__":
    main()
