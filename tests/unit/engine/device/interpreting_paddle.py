"""Triton's interpreter copies tensors to the host by what only torch has. Paddle's, on a CPU, are there already."""

from __future__ import annotations

from typing import Any

from triton.runtime.interpreter import GridExecutor


def take_paddle_tensors() -> None:
    """Let interpreted kernels take Paddle's tensors; once, before the first of them."""
    copy_in, copy_back = GridExecutor._init_args_hst, GridExecutor._restore_args_dev

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        return (args, kwargs) if _has_paddle(args) else copy_in(self, args, kwargs)

    def restore_args(self: Any, args: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        if not _has_paddle(args):
            copy_back(self, args, args_hst, kwargs, kwargs_hst)

    GridExecutor._init_args_hst = init_args
    GridExecutor._restore_args_dev = restore_args


def _has_paddle(args: Any) -> bool:
    return any(type(arg).__module__.startswith("paddle") for arg in args)
