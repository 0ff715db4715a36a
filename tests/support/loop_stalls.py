"""Fails what holds the router's event loop: a stream that runs meanwhile would stand still for as long."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from router.text.tokenizer import TextTokenizer

MAX_STALL_S = 0.05
"""On a machine that does what ``slowness`` measures in ``_USUAL_S``; more on a slower one."""
MAX_INLINE_LENGTH = 64 << 10
"""Longest text, or list of token ids, that may be worked on in the router's process."""
MAX_INLINE_TOTAL = 1 << 19
"""Longest all of them may be together, in one test."""

_USUAL_S = 0.0015
_TESTS = str(Path(__file__).parents[1])
_CLIENTS = ("httpx", "httpcore", "openai", "anyio")


class LoopStalls:
    """What held the loop too long, one line each.

    A callback's time is the CPU time of its thread, not time on the clock, so that other programs on the machine, or
    other threads of this one, change nothing; what the garbage collector took is taken off, since the test's own heap
    is what makes that long. How slow this machine is just now, as when others use the same core, is taken into account.
    Callbacks of tests and clients, which share the loop, do not count.

    A thread that works while it holds the GIL also stops the loop, and cannot be seen in this way. What would do so is
    known: the tokenizer. So neither a long text nor very many short ones may come to a tokenizer of this process, on
    whatever thread. What remains is seen from outside: tests/cluster/test_router_process.py bounds the CPU time of all
    threads of a router.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._num_inline = 0
        self._collecting_s = 0.0
        self._collection_began_s = 0.0

    def measured(self, run: Callable[[asyncio.Handle], None]) -> Callable[[asyncio.Handle], None]:
        """Return ``Handle._run`` with a look at how long it took."""

        def measure(handle: asyncio.Handle) -> None:
            callback: Any = handle._callback  # type: ignore[attr-defined]
            begin_s = time.thread_time() - self._collecting_s
            run(handle)
            took_s = time.thread_time() - self._collecting_s - begin_s
            if took_s > MAX_STALL_S and not _is_foreign(callback) and took_s > MAX_STALL_S * slowness():
                self.found.append(f"{took_s * 1000:.0f} ms in {_owner(callback)}: {callback!r:.300}")

        return measure

    def short_only(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``method`` of the tokenizer with a look at how long its argument is."""

        @wraps(method)
        def look(tokenizer: TextTokenizer, argument: Any, *args: Any, **kwargs: Any) -> Any:
            self._num_inline += 1 + len(argument)
            if len(argument) > MAX_INLINE_LENGTH or self._num_inline > MAX_INLINE_TOTAL:
                self.found.append(
                    f"{method.__name__} of {len(argument)} items, {self._num_inline} in all, in the router's process"
                )
                self._num_inline = 0
            return method(tokenizer, argument, *args, **kwargs)

        return look

    def collecting(self, phase: str, _: dict[str, int]) -> None:
        """Note when the garbage collector begins and stops."""
        if phase == "start":
            self._collection_began_s = time.thread_time()
        else:
            self._collecting_s += time.thread_time() - self._collection_began_s


def slowness() -> float:
    """Return how many times longer than usual this machine takes for plain Python code just now; at least 1."""
    return max(1.0, median(_sample_s() for _ in range(9)) / _USUAL_S)


def _sample_s() -> float:
    begin_s = time.thread_time()
    found: dict[int, str] = {}
    for number in range(20_000):
        found[number & 255] = f"{number}"
    return time.thread_time() - begin_s


@contextmanager
def watching_for_stalls() -> Iterator[LoopStalls]:
    """Watch every loop of asyncio's own kind in this process."""
    stalls = LoopStalls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", stalls.measured(asyncio.Handle._run))
        for name in ("encode", "decode", "tokens_of"):
            patch.setattr(TextTokenizer, name, stalls.short_only(getattr(TextTokenizer, name)))
        gc.callbacks.append(stalls.collecting)
        try:
            yield stalls
        finally:
            gc.callbacks.remove(stalls.collecting)


def _is_foreign(callback: Any) -> bool:
    owner = _owner(callback)
    return owner.startswith(_TESTS) or owner.partition(".")[0] in _CLIENTS


def _owner(callback: Any) -> str:
    """Return the file or module that ``callback`` works for: a task's coroutine, a transport's protocol, or its own."""
    target = getattr(callback, "__self__", callback)
    if isinstance(target, asyncio.Task):
        code = getattr(target.get_coro(), "cr_code", None)
        path = code.co_filename if code else ""
        package = next((name for name in _CLIENTS if f"/site-packages/{name}/" in path), None)
        return package or path
    if isinstance(target, asyncio.BaseTransport) and hasattr(target, "get_protocol"):
        return type(target.get_protocol()).__module__
    return getattr(callback, "__module__", None) or type(target).__module__
