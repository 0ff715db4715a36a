"""The clients' API keys: from a file, which is read again when it changes, or from the environment."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from kvrelay.config.sections import RouterConfig
from kvrelay.errors import ConfigError

VARIABLE = "KVRELAY_API_KEYS"
"""Environment variable with the lines of a key file."""

_REREAD_INTERVAL_S = 1.0
_DIGEST_PREFIX = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = re.compile(r"(requests|tokens_per_minute)=([0-9]{1,12})")

_Version: TypeAlias = tuple[int, int, int]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: its name for logs, its sha256 digest, and its limits (None: no limit)."""

    name: str
    digest: bytes
    max_requests: int | None = None
    tokens_per_minute: int | None = None


def parse_api_keys(text: str, source: str, default: RouterConfig) -> list[ApiKey]:
    """Return the keys in ``text``: lines ``NAME KEY [requests=N] [tokens_per_minute=N]``.

    Instead of KEY a line may have ``sha256:`` and the hexadecimal digest of the key. Empty lines and those that begin
    with ``#`` are skipped. Raises ConfigError that names ``source`` and lines, never a key.
    """
    keys: list[ApiKey] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = _parse(words, default)
        if key is None:
            problems.append(f"{source}:{number}: should read NAME KEY [requests=N] [tokens_per_minute=N]")
        elif any(key.name == other.name or key.digest == other.digest for other in keys):
            problems.append(f"{source}:{number}: {key.name} has the name or the key of an earlier line")
        else:
            keys.append(key)
    if not keys and not problems:
        problems.append(f"{source}: no keys")
    if problems:
        raise ConfigError(problems)
    return keys


def _parse(words: Sequence[str], default: RouterConfig) -> ApiKey | None:
    limits = [_LIMIT.fullmatch(word) for word in words[2:]]
    if len(words) < 2 or not _NAME.fullmatch(words[0]) or None in limits:
        return None
    given = {match[1]: int(match[2]) for match in limits if match is not None}
    digest = _digest(words[1])
    if words[1].startswith(_DIGEST_PREFIX):
        stored = words[1].removeprefix(_DIGEST_PREFIX)
        if not _DIGEST.fullmatch(stored):
            return None
        digest = bytes.fromhex(stored)
    return ApiKey(
        words[0],
        digest,
        given.get("requests", default.key_max_requests),
        given.get("tokens_per_minute", default.key_tokens_per_minute),
    )


class ApiKeys:
    """The keys that are valid now. ``now`` returns the time in seconds; ``version``: that of the file they are from."""

    def __init__(
        self, keys: Sequence[ApiKey], config: RouterConfig, now: Callable[[], float], version: _Version | None = None
    ) -> None:
        self._keys = keys
        self._config = config
        self._now = now
        self._path = None if config.api_keys_file is None else Path(config.api_keys_file)
        self._version = version
        self._read_s = now()

    @classmethod
    def of(cls, config: RouterConfig, now: Callable[[], float], env: Mapping[str, str] = os.environ) -> ApiKeys | None:
        """Return the keys that ``config`` or ``env`` gives, or None if there are none.

        Raises ConfigError if they cannot be read.
        """
        if config.api_keys_file is not None:
            path = Path(config.api_keys_file)
            version = _version(path)  # before it is read: what is changed meanwhile is read again
            return cls(_read(path, config), config, now, version)
        if env.get(VARIABLE, "").strip():
            return cls(parse_api_keys(env[VARIABLE], VARIABLE, config), config, now)
        return None

    def find(self, secret: str) -> ApiKey | None:
        """Return the key that ``secret`` is, or None. Every key is compared, in a time that does not depend on it."""
        self._read_again()
        digest, found = _digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def _read_again(self) -> None:
        """Read the file again if it has changed. If it is damaged now, the keys read before stay valid."""
        if self._path is None or self._now() - self._read_s < _REREAD_INTERVAL_S:
            return
        self._read_s = self._now()
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = _read(self._path, self._config)
            logger.info("API keys read again: %s", ", ".join(key.name for key in self._keys))
        except ConfigError as error:
            logger.error("the API keys read before stay valid: %s", error.message)


def _read(path: Path, config: RouterConfig) -> list[ApiKey]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"router.api_keys_file: cannot read {path}: {error}"]) from error
    return parse_api_keys(text, str(path), config)


def _version(path: Path) -> _Version | None:
    """Return what differs after any change, of the permissions too: a file that could not be read may be readable."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
