"""Triton's interpreter turns scalars into Python integers in a way that numpy 2.4 refuses: see to it here."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def prepare_interpreter() -> None:
    """Make kernels run interpreted; once, before the first of them."""
    original = interpreter._patch_lang_tensor

    def with_integers(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_integers
