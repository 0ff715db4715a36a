"""The key of operators, who may drain and stop nodes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kvrelay.errors import ConfigError

VARIABLE = "KVRELAY_ADMIN_KEY"
"""Environment variable with the key, where no file is named."""

_MIN_CHARS = 16


def read_admin_key(key_file: str | None, env: Mapping[str, str] = os.environ) -> str | None:
    """Return the key in ``key_file``, else that in ``env``, else None.

    Raises ConfigError if the file cannot be read or the key is too short, without quoting it.
    """
    if key_file is None:
        where, key = f"env {VARIABLE}", env.get(VARIABLE, "").strip()
        if not key:
            return None
    else:
        where = f"router.admin_key_file: {key_file}"
        try:
            key = Path(key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise ConfigError([f"{where}: {reason}"]) from error
    if len(key) < _MIN_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError([f"{where}: a key is at least {_MIN_CHARS} printable ASCII characters without spaces"])
    return key
