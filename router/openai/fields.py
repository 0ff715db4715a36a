"""The base class of requests and of the objects in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

Flag = bool | None


class Fields(BaseModel):
    """Base class of requests and of their objects: no conversion of types, no null.

    ``refused``: fields that are refused in a request of this kind, and the reasons. ``ignored``: fields that change
    nothing. ``copied``: fields that somebody else reads.
    """

    refused: ClassVar[Mapping[str, str]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    copied: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if not isinstance(value, dict) or None not in value.values():
            return value
        return {name: item for name, item in value.items() if item is not None}
