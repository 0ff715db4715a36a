"""The keys by which the processes of a cluster know each other: CURVE key pairs, one for each node and for the router.

A directory of keys has ``public/NAME.key`` of every process and ``secret/NAME.key`` of those that run on its host. A
file contains one key in Z85 (40 characters).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from kvrelay.errors import ConfigError
from kvrelay.protocol.ids import ROUTER, PeerId, peer_name
from kvrelay.runtime.logging import log_event

if TYPE_CHECKING:  # the messager's process does not need pydantic and starts faster without it
    from kvrelay.config.sections import SecurityConfig

_PUBLIC, _SECRET, _SUFFIX = "public", "secret", ".key"
_KEY = re.compile(rb"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\n?")


@dataclass(frozen=True, slots=True)
class Keys:
    """The key pair of the process ``name``, and the public keys of all processes by name."""

    name: str
    secret: bytes = field(repr=False)
    public: Mapping[str, bytes]

    @classmethod
    def load(cls, directory: Path, name: str) -> Keys:
        """Read ``directory`` for the process ``name``.

        Raises ConfigError if a key is missing or damaged, or if others may read the secret key.
        """
        public = {path.stem: _read(path) for path in sorted((directory / _PUBLIC).glob(f"*{_SUFFIX}"))}
        secret_file = directory / _SECRET / f"{name}{_SUFFIX}"
        secret = _read(secret_file)
        if secret_file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError([f"security.keys: others may read {secret_file}; run chmod 600 {secret_file}"])
        if public.get(name) != zmq.curve_public(secret):
            raise ConfigError([f"security.keys: {directory} has no public key that fits {secret_file}"])
        if ROUTER not in public:
            raise ConfigError([f"security.keys: {directory} has no public key of the router"])
        return cls(name, secret, public)

    @classmethod
    def load_any(cls, directory: Path) -> Keys:
        """Read ``directory`` for any process whose secret key it has. Raises ConfigError as ``load``."""
        names = sorted(path.stem for path in (directory / _SECRET).glob(f"*{_SUFFIX}"))
        return cls.load(directory, names[0] if names else ROUTER)

    @property
    def own_public(self) -> bytes:
        """The public key of this process."""
        return self.public[self.name]

    def public_of(self, peer: PeerId) -> bytes | None:
        """Return the public key of ``peer``, or None if it has none."""
        return self.public.get(key_name(peer))

    def owner(self, public: bytes) -> str | None:
        """Return the name of the process with this public key (Z85), or None."""
        return next((name for name, key in self.public.items() if key == public), None)


def configured_keys(security: SecurityConfig, name: str) -> Keys | None:
    """Return the keys of the process ``name``, None without ``security.keys``. Raises ConfigError as ``Keys.load``."""
    if security.keys is not None:
        return Keys.load(Path(security.keys), name)
    if security.insecure:
        log_event("error", "insecure: processes do not authenticate each other", {"set": "security.keys"})
    return None


def key_name(peer: PeerId) -> str:
    """Return the name of the key of ``peer``: parts of a node, such as its messager, use the node's."""
    return peer_name(peer).partition(".")[0]


def make_keys(directory: Path, names: Iterable[str]) -> list[str]:
    """Make a key pair in ``directory`` for each of ``names`` that has none; return the names of the new ones.

    Secret keys get the mode 0600 in a directory of mode 0700. Raises ConfigError if a file cannot be written.
    """
    made = []
    try:
        (directory / _PUBLIC).mkdir(parents=True, exist_ok=True)
        (directory / _SECRET).mkdir(mode=0o700, exist_ok=True)
        for name in names:
            public_file = directory / _PUBLIC / f"{name}{_SUFFIX}"
            if public_file.exists():
                continue
            public, secret = zmq.curve_keypair()
            secret_file = directory / _SECRET / f"{name}{_SUFFIX}"
            secret_file.touch(mode=0o600)
            secret_file.write_bytes(secret + b"\n")
            public_file.write_bytes(public + b"\n")
            made.append(name)
    except OSError as error:
        raise ConfigError([f"cannot write {error.filename}: {error.strerror}"]) from error
    return made


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"security.keys: cannot read {path}: {error.strerror}"]) from error
    key = content.strip()
    try:
        zmq.curve_public(key if _KEY.fullmatch(content) else b"")  # not every text of this form is a number of 32 bytes
    except (zmq.ZMQError, ValueError):
        raise ConfigError([f"security.keys: {path} does not contain a key"]) from None
    return key
