"""Starts a node's cache messager."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from cache_messager.settings import MessagerSettings

STOP_TIMEOUT_S = 5.0
"""How long a messager may take to end once its node lets go of it."""


@asynccontextmanager
async def launched(settings: MessagerSettings) -> AsyncIterator[Process]:
    """Run a messager in a process of its own that does not outlive this one, and have it ended afterwards.

    It reports with MessagerReady when it can be used. Its standard input is its lifeline: when nobody holds the other
    end any more, however this process ended, the messager ends too.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cache_messager", stdin=asyncio.subprocess.PIPE
    )
    try:
        if process.stdin is not None:
            process.stdin.write(msgspec.json.encode(settings) + b"\n")
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
