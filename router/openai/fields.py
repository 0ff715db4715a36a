"""The base class of requests and of the objects in them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator

Flag = bool | None


class Fields(BaseModel):
    """Base class of requests and of their objects: no conversion of types, no null."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if not isinstance(value, dict) or None not in value.values():
            return value
        return {name: item for name, item in value.items() if item is not None}
