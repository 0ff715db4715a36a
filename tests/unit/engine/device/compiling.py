"""Compiling Triton kernels for a GPU that is not here: what they launch is compiled and not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)


class _NoDevice:
    """Says which GPU to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


@contextmanager
def compiled_only() -> Iterator[list[Any]]:
    """Compile every kernel launched within; give what the compiler made of them."""
    made: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(_NoDevice())
    JITFunction.run = compile_only
    try:
        yield made
    finally:
        JITFunction.run = run
        driver._active = None
