"""Reads the JSON files of a checkpoint, for the router and the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
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
        text = path.read_text("utf-8-sig")
        content = json.loads(text)
        if r"\ud" in text.lower():  # half of a pair of surrogates can be no text of a tokenizer
            json.dumps(content, ensure_ascii=False).encode()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def positive_integer(content: Mapping[str, Any], key: str) -> int:
    """Return the positive integer at ``key`` of a ``config.json``. Raises CheckpointError."""
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} should be a positive integer, not {value!r:.80}")
    return value


def finite_number(value: object, name: str, file: str = "config.json") -> float:
    """Return ``value``, which ``file`` has at ``name``, if it is a number. Raises CheckpointError."""
    if type(value) in (int, float):
        with suppress(OverflowError):  # an integer may be larger than any float
            number = float(value)  # type: ignore[arg-type]
            if math.isfinite(number):
                return number
    raise CheckpointError(f"{file}: {name} should be a number, not {value!r:.80}")


def eos_token_ids(content: Mapping[str, Any], file: str) -> list[int]:
    """Return the end-of-text ids that ``file`` names: one, a list or none. Raises CheckpointError if not integers."""
    value = content.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise CheckpointError(f"{file}: eos_token_id should be a token id or a list of them, not {value!r:.80}")
    return ids
