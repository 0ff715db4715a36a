"""What a process owns that outlives a test if nobody gives it back. Linux, through /proc, in under a millisecond."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

SETTLE_S = 10.0
"""What is being torn down already (a thread past its last statement, a child just killed) may take this long to go."""

_SELF = Path("/proc/self")
_OWN_FD = re.compile(r"^(socket:|pipe:|/memfd:|/dev/shm/|anon_inode:\[(eventfd|eventpoll|io_uring|pidfd))")
_INODE = re.compile(r":?\[\d+\]$")
_OWN_MAPPING = re.compile(r"(/memfd:\S+|/dev/shm/\S+)")
_SHARED_MEMORY = Path("/dev/shm")
_OWN_SHARED_MEMORY = re.compile(r"kvrelay-(?:.*-)?(\d+)")
"""What kvrelay would call a file there: it ends with the pid of its maker. All else in it is other programs'."""


@dataclass(frozen=True)
class Belongings:
    """Child processes, threads, descriptors, shared memory and runtime files at one moment."""

    counts: Counter[str]

    @classmethod
    def now(cls) -> Belongings:
        """Look."""
        return cls(Counter([*_children(), *_threads(), *_descriptors(), *_mappings(), *_files()]))

    def leaked(self, but: str | None = None) -> list[str]:
        """Return what is there now and was not then, once it had time to go; nothing whose name has ``but`` in it."""
        leaked = self._more_now(but)
        deadline = time.monotonic() + SETTLE_S
        while leaked and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
            leaked = self._more_now(but)
        return [_described(name) for name in leaked]

    def _more_now(self, but: str | None) -> list[str]:
        more = sorted((Belongings.now().counts - self.counts).elements())
        return [name for name in more if but is None or but not in name]


def _children() -> list[str]:
    return [f"process {pid}" for task in _tasks() for pid in _read(task / "children").split()]


def _described(name: str) -> str:
    """Add to a process what it calls itself now, which changes during its life."""
    kind, _, pid = name.partition(" ")
    return f"{name} ({_read(Path('/proc') / pid / 'comm').strip()})" if kind == "process" else name


def _threads() -> list[str]:
    return [f"thread {thread.name}" for thread in threading.enumerate()]


def _tasks() -> list[Path]:
    return list((_SELF / "task").iterdir())


def _descriptors() -> list[str]:
    targets = []
    for entry in (_SELF / "fd").iterdir():
        try:
            targets.append(str(entry.readlink()))
        except FileNotFoundError:  # the directory's own descriptor
            continue
    # A socket's inode number means nothing to the reader and would hide that one was closed and another opened.
    return [f"descriptor {_INODE.sub('', target)}" for target in targets if _OWN_FD.match(target)]


def _mappings() -> list[str]:
    return [f"mapping {name}" for name in _OWN_MAPPING.findall(_read(_SELF / "maps"))]


def _files() -> list[str]:
    shared_memory = [path for path in _SHARED_MEMORY.iterdir() if _is_ours(path.name)]
    return [f"file {path}" for path in (*shared_memory, *files_below(os.environ["XDG_RUNTIME_DIR"]))]


def files_below(directory: str | Path) -> list[Path]:
    """Return all there is below ``directory``; ``rglob`` raises if one that it has listed is removed meanwhile."""
    return [Path(parent, name) for parent, folders, names in os.walk(directory) for name in (*folders, *names)]


def _is_ours(name: str) -> bool:
    """Tell whether a file in /dev/shm was made by this process or one it started, as far as its name tells.

    What a living process outside this session made belongs to somebody else, such as another run of the tests.
    """
    match = _OWN_SHARED_MEMORY.fullmatch(name)
    if match is None:
        return False
    me = psutil.Process()
    try:
        maker = psutil.Process(int(match[1]))
        return maker == me or me in maker.parents()
    except psutil.NoSuchProcess:
        return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""
