"""An object and a tool for clients that take pydantic's models and Python's functions."""

# mypy: ignore-errors

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Place(BaseModel):
    """Where a thing is."""

    model_config = ConfigDict(extra="forbid")

    thing: Literal["red key", "blue lamp"]
    box: Literal[9, 417]


def find(box: Literal[9, 417]) -> str:
    """Find what is in a box.

    Args:
        box: The number of the box.
    """
    return f"box {box} is empty"
