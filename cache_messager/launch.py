"""Starts a node's cache messager."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec

from cache_messager.settings import MessagerSettings

STOP_TIMEOUT_S = 5.0
"""Seconds a messager may take to exit after its node has closed its standard input."""


@asynccontextmanager
async def launched(settings: MessagerSettings) -> AsyncIterator[Process]:
    """Run a messager as a child process for the context. It does not outlive this process.

    It sends MessagerReady when it can be used. It exits when its standard input is closed, which also happens whenever
    this process ends.
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
            with suppress(ProcessLookupError):  # it has ended just now
                process.kill()
            await process.wait()
