"""Hands the ``--set`` overrides of ``kvrelay up`` to its processes.

They may contain passwords. Every user can read a process's arguments, and only its own user its environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping, Sequence

_VARIABLE = "KVRELAY_OVERRIDES"


def handed_on(overrides: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that hand ``overrides`` on; none if there are no overrides."""
    return {_VARIABLE: json.dumps(list(overrides))} if overrides else {}


def inherited(env: MutableMapping[str, str] = os.environ) -> list[str]:
    """Remove from ``env`` and return the overrides that the parent process handed on."""
    overrides: list[str] = json.loads(env.pop(_VARIABLE, "[]"))
    return overrides
