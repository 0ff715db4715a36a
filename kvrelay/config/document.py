"""A config file before validation: plain data with the location of every key."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from kvrelay.errors import ConfigError

Key: TypeAlias = tuple[str | int, ...]
"""Path of a key: ``("nodes", 0, "cache", "num_blocks")``."""

ENV_PREFIX = "KVRELAY_"
_MAX_DEPTH = 32
_MAX_VALUES = 100_000
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What PyYAML raises for a text that is not YAML, or for a value that does not fit its tag, such as ``!!bool x``."""


class Document:
    """The data of a config file and the location of each key. An override replaces a key and its location.

    ``problems`` collects what is wrong with the file or an override itself, as finished lines; ``warnings`` the keys
    with an earlier name, likewise.
    """

    def __init__(self, name: str, data: dict[str, Any], lines: dict[Key, int] | None = None) -> None:
        self.name = name
        self.data = data
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._places: dict[Key, str] = {key: f"{name}:{line}" for key, line in (lines or {}).items()}

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read a YAML file. Raises ConfigError if it cannot be read or has no sections."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise ConfigError([f"{path}: {reason}"]) from error
        root, data = _parse(text, path)
        if not isinstance(data, dict):
            raise ConfigError([f"{path}:1: should contain sections such as model: and nodes:, not {_shown(data)}"])
        document = cls(str(path), _unshared(data, path))
        if root is not None:
            document._note_places(root, ())
        return document

    def apply_env(self, env: Mapping[str, str]) -> None:
        """Override keys by variables such as ``KVRELAY_ROUTER__PORT``. Names without ``__`` are ignored."""
        for name, value in sorted(env.items()):
            path = name.removeprefix(ENV_PREFIX)
            if path != name and "__" in path:
                self._override(path.lower().split("__"), value, f"env {name}")

    def apply_overrides(self, overrides: Iterable[str]) -> None:
        """Override keys by texts such as ``router.port=8001`` or ``nodes.d0.cache.num_blocks=64``."""
        for text in overrides:
            path, equals, value = text.partition("=")
            if not equals or not path.strip():
                self.problems.append(f"--set {text}: should read key=value, such as router.port=8001")
            else:
                self._override(path.strip().split("."), value, f"--set {text}")

    def rename(self, section: str, old: str, new: str) -> None:
        """Rename key ``old`` of ``section`` to ``new``, in the cluster and in each node. Both names are a problem."""
        for parent in ((section,), *(("nodes", index, section) for index in range(len(self._node_names())))):
            keys = self._find(parent)
            if not isinstance(keys, dict) or old not in keys:
                continue
            if new in keys:
                self.problems.append(self.describe((*parent, old), f"is the old name of {new}, which is given too"))
                del keys[old]
                continue
            self.warnings.append(self.describe((*parent, old), f"is deprecated, use {new}"))
            keys[new] = keys.pop(old)
            self._places[*parent, new] = self._places.pop((*parent, old), self.name)

    def resolved(self, sections: list[str]) -> dict[str, Any]:
        """Return the data; every node's sections are completed from the cluster's."""
        data = copy.deepcopy(self.data)
        shared = {name: data[name] for name in sections if name in data}
        if isinstance(nodes := data.get("nodes"), list):
            data["nodes"] = [_merged(shared, node) if isinstance(node, dict) else node for node in nodes]
        return data

    def has(self, key: Key) -> bool:
        """Return whether the file or an override contains ``key`` itself."""
        return self._find(key) is not _NOTHING

    def shown(self, key: Key) -> str:
        """Return the value at ``key`` as an error message shows it."""
        return _shown(self._find(key))

    def describe(self, key: Key, reason: str) -> str:
        """Return the error line for ``key``, with its location."""
        place = next(
            (self._places[key[:end]] for end in range(len(key), -1, -1) if key[:end] in self._places), self.name
        )
        return f"{place}: {'.'.join(self._spelled(key))}: {reason}" if key else f"{place}: {reason}"

    def _find(self, key: Key) -> Any:
        value: Any = self.data
        for part in key:
            if isinstance(value, dict):
                value = value.get(part, _NOTHING)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return _NOTHING
        return value

    def _spelled(self, key: Key) -> Iterable[str]:
        """Spell ``key`` as for ``--set``, with a node's name if that is unique."""
        parts = [str(part) for part in key]
        if key[0] == "nodes" and len(key) > 2 and isinstance(key[1], int):
            name = self._find((*key[:2], "name"))
            if isinstance(name, str) and self._node_names().count(name) == 1:
                parts[1] = name
        return parts

    def _node_names(self) -> list[object]:
        nodes = self.data.get("nodes")
        return (
            [node.get("name") if isinstance(node, dict) else None for node in nodes] if isinstance(nodes, list) else []
        )

    def _override(self, path: list[str], text: str, place: str) -> None:
        try:
            _, value = _load(text)
        except _NOT_YAML:
            value = text
        if len(path) > _MAX_DEPTH:
            self.problems.append(f"{place:.100}: nested more than {_MAX_DEPTH} levels deep")
            return
        key = self._override_key(path, place)
        if key is None:
            return
        target: Any = self.data
        for depth, (part, following) in enumerate(itertools.pairwise(key), start=1):
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
                self._places[key[:depth]] = place
            target = target[part]
            if not isinstance(target, list if isinstance(following, int) else dict):
                self.problems.append(f"{place}: {part} has no key {following}")
                return
        target[key[-1]] = value
        self._places = {known: at for known, at in self._places.items() if known[: len(key)] != key}
        self._places[key] = place

    def _override_key(self, path: list[str], place: str) -> Key | None:
        """Return ``path`` with a node's name replaced by its index."""
        if path[0] != "nodes" or len(path) == 1:
            return tuple(path)
        names = [str(name).lower() for name in self._node_names()]
        if path[1].lower() in names:
            return ("nodes", names.index(path[1].lower()), *path[2:])
        indices = [str(index) for index in range(len(names))]
        if path[1] in indices:
            return ("nodes", indices.index(path[1]), *path[2:])
        self.problems.append(f"{place}: no node is called {path[1]!r}")
        return None

    def _note_places(self, node: yaml.Node, key: Key) -> None:
        self._places.setdefault(key, f"{self.name}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._note_places(item, (*key, index))
        elif isinstance(node, yaml.MappingNode):
            self._note_mapping(node, key)

    def _note_mapping(self, node: yaml.MappingNode, key: Key) -> None:
        seen: dict[str, int] = {}
        for name_node, value_node in node.value:
            name, line = name_node.value, name_node.start_mark.line + 1
            if not isinstance(name, str):
                continue
            if name in seen:
                path = ".".join(map(str, (*key, name)))
                self.problems.append(f"{self.name}:{line}: {path}: given twice, first in line {seen[name]}")
            seen[name] = line
            self._places[(*key, name)] = f"{self.name}:{line}"
            self._note_places(value_node, (*key, name))


_NOTHING = object()


def _unshared(value: Any, path: Path, depth: int = 0) -> Any:
    """Return a copy of ``value`` in which YAML aliases share nothing. Raises ConfigError if it is nested too deep."""
    if depth > _MAX_DEPTH:
        raise ConfigError([f"{path}:1: nested more than {_MAX_DEPTH} levels deep"])
    if isinstance(value, dict):
        return {name: _unshared(item, path, depth + 1) for name, item in value.items()}
    return [_unshared(item, path, depth + 1) for item in value] if isinstance(value, list) else value


def _merged(base: Any, over: Any) -> Any:
    """Return ``base`` overridden by the keys of ``over``, section by section."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{name: _merged(base[name], value) if name in base else value for name, value in over.items()}}


_PASSWORDS = re.compile(r"(?<=://)[^@\s'\"]*(?=@)|(?<=password=)[^&\s'\"]+")
"""Users with their passwords in URLs."""


def _shown(value: object) -> str:
    if value is None or value is _NOTHING:
        return "nothing"
    text = _PASSWORDS.sub("***", repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _parse(text: str, path: Path) -> tuple[yaml.Node | None, Any]:
    """Return the YAML nodes of ``text`` and their data. Raises ConfigError if it is not YAML."""
    try:
        return _load(text)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        raise ConfigError([f"{path}:{line}: not YAML: {getattr(error, 'problem', None) or error}"]) from error


def _load(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the YAML nodes of ``text`` and their data. Raises one of ``_NOT_YAML``."""
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    if root is None:
        return None, None
    if _num_values(root, {}) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES:,} values, with those that aliases repeat")
    return root, loader.construct_document(root)


def _num_values(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    """Return how many values ``node`` has when aliases share nothing. Raises ValueError if it contains itself.

    ``known``: the result of each node, None while it is being counted.
    """
    if node in known:
        found = known[node]
        if found is None:
            raise ValueError("an alias in the value that it stands for")
        return found
    known[node] = None
    inner = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
    counted = 1 + sum(_num_values(item, known) for item in inner) if isinstance(node, yaml.CollectionNode) else 1
    known[node] = counted
    return counted
