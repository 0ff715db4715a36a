"""The values of ``cluster.self_check``, for processes that do without pydantic."""

from typing import Literal, TypeAlias

SelfCheckMode: TypeAlias = Literal["off", "report", "fatal"]
"""What a process does about its conservation laws (``kvrelay/machine/self_check.py``)."""
