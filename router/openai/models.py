"""The model list, and the check of a request's model."""

from __future__ import annotations

from kvrelay.errors import ModelNotFoundError
from router.model import ServedModel
from router.openai.field_types import shown


def model_name(name: str | None, model: ServedModel) -> str:
    """Return the model name for the answer: the name in the request, or else the first.

    Raises ModelNotFoundError if ``name`` is none of the served model's.
    """
    if name is None:
        return model.name
    if name in (model.name, *model.aliases) or _is_path(name, model.root):
        return name
    raise ModelNotFoundError(f"model {shown(name)} is not served here; {model.name!r} is", param="model")


def model_cards(model: ServedModel, *, created_s: int, max_model_len: int) -> list[dict[str, object]]:
    """Return the items of ``/v1/models``: the model under each of its names."""
    return [
        model_card(name, model, created_s=created_s, max_model_len=max_model_len)
        for name in (model.name, *model.aliases)
    ]


def model_card(name: str, model: ServedModel, *, created_s: int, max_model_len: int) -> dict[str, object]:
    """Return ``model`` under ``name`` as an item of ``/v1/models``."""
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "kvrelay",
        "root": model.root,
        "parent": None,
        "max_model_len": max_model_len,
    }


def _is_path(name: str, root: str) -> bool:
    """Return whether ``name`` is ``root`` or its end, at least parent and directory, as in ``Qwen/Qwen3-0.6B``."""
    name = name.removeprefix("./").rstrip("/")
    return name == root or ("/" in name and root.endswith(f"/{name}"))
