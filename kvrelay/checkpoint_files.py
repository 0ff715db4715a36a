"""Reads the JSON files of a checkpoint, for the router and the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvrelay.errors import CheckpointError


def read_json_object(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Return the object in the JSON file at ``path``, which may start with a UTF-8 byte order mark.

    A file that is not ``required`` and not there is an empty object. Raises CheckpointError that names the file.
    """
    if not required and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
