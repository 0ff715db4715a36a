"""What Triton's interpreter does otherwise than a device, or cannot do: see to it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def prepare_interpreter() -> None:
    """Make kernels run interpreted; once, before the first of them."""
    _take_scalars_as_integers()
    _round_to_float8()
    _patch_once_a_launch()


def _take_scalars_as_integers() -> None:
    """Numpy 2.4 refuses the interpreter's way."""
    original = interpreter._patch_lang_tensor

    def with_integers(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_integers


def _round_to_float8() -> None:
    """Round to nearest even; the interpreter cuts bits off."""
    original = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if target == tl.float8e4nv and source == tl.float32:
            values = torch.from_numpy(np.array(data, np.float32)).clamp(-448, 448)
            return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = converted


def _patch_once_a_launch() -> None:
    """Patch the language for the functions of a module once in a launch of a kernel.

    The interpreter does so whenever a kernel calls a function, and only the end of the launch takes it back. What it
    patches again is the same, and it takes half of the time of a kernel that calls many functions.
    """
    original = interpreter._patch_lang
    patched: set[str] = set()

    def patch_once(fn: Any) -> Any:
        module = fn.__globals__["__name__"]
        if module in patched:
            return None  # the call of a function: nobody looks at the scope
        scope = original(fn)
        if not patched:
            scope.restore = taking_back(scope.restore)
        patched.add(module)
        return scope

    def taking_back(restore: Callable[[], None]) -> Callable[[], None]:
        def restored() -> None:
            patched.clear()
            restore()

        return restored

    interpreter._patch_lang = patch_once


def sum_in_order(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have products add one term after the other, as a device does. Numpy's order depends on a matrix's shape."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = d.data.copy()
        left, right = a.data.astype(total.dtype), b.data.astype(total.dtype)
        for index in range(left.shape[1]):
            total += left[:, index, None] * right[None, index]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    patch(interpreter.InterpreterBuilder, "create_dot", create_dot)
