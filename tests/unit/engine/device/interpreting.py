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


def sum_in_order(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have products add one term after the other, as a device does. Numpy's order depends on a matrix's shape."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = d.data.copy()
        left, right = a.data.astype(total.dtype), b.data.astype(total.dtype)
        for index in range(left.shape[1]):
            total += left[:, index, None] * right[None, index]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    patch(interpreter.InterpreterBuilder, "create_dot", create_dot)
