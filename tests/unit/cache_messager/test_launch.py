"""Ends of a messager that its node has started."""

from __future__ import annotations

import asyncio
import io
from contextlib import closing
from pathlib import Path

import pytest
from messager_node import settings_of
from messager_pair import GEOMETRY, NUM_BLOCKS
from pools import make_pool

from cache_messager.launch import launched
from cache_messager.settings import MessagerSettings


class EndsLate:
    """A process that ends just after its node has lost patience: there is nothing left to kill."""

    def __init__(self) -> None:
        self.stdin = io.BytesIO()
        self.kills = 0

    async def wait(self) -> int:
        if not self.kills:
            raise TimeoutError
        return 0

    def kill(self) -> None:
        self.kills += 1
        raise ProcessLookupError


def test_messager_that_ends_just_before_it_is_killed_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = EndsLate()

    async def start(*_command: str, **_pipes: int) -> EndsLate:
        return process

    async def launch_and_stop(settings: MessagerSettings) -> None:
        async with launched(settings):
            pass

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    with closing(make_pool(GEOMETRY, NUM_BLOCKS, on_device=False)) as pool:
        asyncio.run(launch_and_stop(settings_of("d0", tmp_path, pool)))
    assert process.kills == 1
