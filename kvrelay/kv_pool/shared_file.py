"""Anonymous files that other processes of this host map: a handle of pid, descriptor and a random tag finds one.

Such a file (``memfd_create``) has no name that could outlive its processes, so a node that is killed leaves nothing
behind, and its size is not bound by a small ``/dev/shm``. Another process of the same user maps it through
``/proc/<pid>/fd/<fd>``; the tag in its last bytes tells whether a handle still means this file or the pid was reused.
"""

from __future__ import annotations

import mmap
import os
import secrets

from kvrelay.errors import GeometryMismatchError, PeerLostError

TAG_BYTES = 16


def create_file(name: str, size_bytes: int) -> tuple[int, str]:
    """Make a zeroed file with a tag after ``size_bytes``; return its descriptor and the tag. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size_bytes + TAG_BYTES)
        tag = secrets.token_hex(TAG_BYTES // 2)
        os.pwrite(fd, tag.encode(), size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd, tag


def map_file(fd: int, size_bytes: int) -> mmap.mmap:
    """Map such a file, whose descriptor is closed if that fails. Raises OSError."""
    try:
        return mmap.mmap(fd, size_bytes + TAG_BYTES)
    except OSError:
        os.close(fd)
        raise


def open_file(pid: int, fd: int, tag: str, size_bytes: int) -> int:
    """Open the file that process ``pid`` made; return a descriptor of it.

    Raises PeerLostError if that process is gone or out of reach, GeometryMismatchError if the file is of another size.
    """
    try:
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PeerLostError(f"cannot map the KV memory of process {pid}: {error}") from error
    if os.fstat(own).st_size != size_bytes + TAG_BYTES:
        os.close(own)
        raise GeometryMismatchError(f"KV memory of process {pid} is not {size_bytes} bytes")
    if os.pread(own, TAG_BYTES, size_bytes) != tag.encode():
        os.close(own)
        raise PeerLostError(f"process {pid} is not the process that created this KV memory")
    return own
