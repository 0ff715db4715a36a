"""The model list, and whether a client asked for a model that is on it."""

from __future__ import annotations

from kvrelay.core.errors import ModelNotFoundError
from router.model import ServedModel


def check_model(name: str | None, model: ServedModel) -> None:
    """Raise ModelNotFoundError if ``name`` is not the served model's; without a name that one is meant."""
    if name is not None and name != model.name:
        raise ModelNotFoundError(f"model {name[:256]!r} is not served here; {model.name!r} is", param="model")


def model_card(model: ServedModel, *, created_s: int, max_model_len: int) -> dict[str, object]:
    """Return ``model`` as an item of ``/v1/models``."""
    return {
        "id": model.name,
        "object": "model",
        "created": created_s,
        "owned_by": "kvrelay",
        "root": model.root,
        "parent": None,
        "max_model_len": max_model_len,
    }
