"""Device memory that other processes open, by functions of CUDA's driver.

The pool is an allocation of its own and not a piece of a framework's: its IPC handle then names it alone, whatever the
framework's allocator does, and it is given back when the pool is closed.
"""

from __future__ import annotations

import ctypes
import errno
from ctypes import byref

from kvrelay.errors import DeviceError, PeerLostError

HANDLE_BYTES = 64

PAGE_BYTES = 2 << 20
"""An allocation of whole pages shares none with another, so its handle gives away nothing else."""

_OUT_OF_MEMORY = 2
_LAZY_PEER_ACCESS = 1
_NOT_READY = 600
_BLOCKING_WITHOUT_TIMING = 1 | 2


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


_ARGUMENTS = {
    "cuCtxGetCurrent": [ctypes.POINTER(ctypes.c_void_p)],
    "cuCtxSetCurrent": [ctypes.c_void_p],
    "cuMemAlloc_v2": [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t],
    "cuMemFree_v2": [ctypes.c_uint64],
    "cuMemsetD8_v2": [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t],
    "cuCtxSynchronize": [],
    "cuIpcGetMemHandle": [ctypes.POINTER(_IpcHandle), ctypes.c_uint64],
    "cuIpcOpenMemHandle_v2": [ctypes.POINTER(ctypes.c_uint64), _IpcHandle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [ctypes.c_uint64],
    "cuEventCreate": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint],
    "cuEventRecord": [ctypes.c_void_p, ctypes.c_void_p],
    "cuEventQuery": [ctypes.c_void_p],
    "cuEventSynchronize": [ctypes.c_void_p],
    "cuEventDestroy_v2": [ctypes.c_void_p],
    "cuStreamWaitEvent": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint],
    "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
}


class CudaDriver:
    """The driver, used in the context that is current where this is made. Other threads enter it by themselves."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DeviceError(f"there is no CUDA driver here: {error}") from error
        for name, arguments in _ARGUMENTS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        context = ctypes.c_void_p()
        self._require("cuCtxGetCurrent", byref(context))
        if not context.value:
            raise DeviceError("no CUDA context is current")
        self._context = context

    def allocate(self, size_bytes: int) -> int:
        """Return the address of zeroed memory. Raises OSError if there is not enough, DeviceError otherwise."""
        address = ctypes.c_uint64()
        size_bytes = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        self._enter()
        code = self._call("cuMemAlloc_v2", byref(address), size_bytes)
        if code == _OUT_OF_MEMORY:
            raise OSError(errno.ENOMEM, "the device has not that much memory left")
        self._check(code, "cuMemAlloc")
        self._require("cuMemsetD8_v2", address, 0, size_bytes)
        self._require("cuCtxSynchronize")
        return address.value

    def export(self, address: int) -> bytes:
        """Return the handle by which other processes of this host open what ``allocate`` returned."""
        handle = _IpcHandle()
        self._enter()
        self._require("cuIpcGetMemHandle", byref(handle), address)
        return bytes(handle)

    def open(self, memory: bytes) -> int:
        """Return the address here of another process's memory. Raises PeerLostError if it cannot be reached."""
        if len(memory) != HANDLE_BYTES:
            raise PeerLostError(f"{len(memory)} bytes are no handle of CUDA memory")
        address = ctypes.c_uint64()
        self._enter()
        code = self._call(
            "cuIpcOpenMemHandle_v2", byref(address), _IpcHandle.from_buffer_copy(memory), _LAZY_PEER_ACCESS
        )
        if code:
            raise PeerLostError(f"cannot open the peer's CUDA memory: {self._name(code)}")
        return address.value

    def free(self, address: int) -> None:
        """Give back what ``allocate`` returned."""
        self._enter()
        self._require("cuMemFree_v2", address)

    def close(self, address: int) -> None:
        """Let go of what ``open`` returned. Its process may have ended."""
        self._enter()
        self._call("cuIpcCloseMemHandle", address)

    def create_event(self) -> int:
        """Return a new event, whose waits use no CPU."""
        event = ctypes.c_void_p()
        self._enter()
        self._require("cuEventCreate", byref(event), _BLOCKING_WITHOUT_TIMING)
        return event.value or 0

    def record_event(self, event: int, stream: int) -> None:
        """Mark the end of what is queued on ``stream`` so far."""
        self._enter()
        self._require("cuEventRecord", event, stream)

    def has_passed(self, event: int) -> bool:
        """Return whether the device has passed the mark."""
        self._enter()
        code = self._call("cuEventQuery", event)
        if code == _NOT_READY:
            return False
        self._check(code, "cuEventQuery")
        return True

    def wait_for_event(self, event: int) -> None:
        """Wait until the device has passed the mark. Other Python threads run meanwhile."""
        self._enter()
        self._require("cuEventSynchronize", event)

    def queue_wait(self, stream: int, event: int) -> None:
        """Run work that is queued on ``stream`` from now on after ``event``."""
        self._enter()
        self._require("cuStreamWaitEvent", stream, event, 0)

    def destroy_event(self, event: int) -> None:
        """Give ``event`` back."""
        self._call("cuEventDestroy_v2", event)

    def _enter(self) -> None:
        self._require("cuCtxSetCurrent", self._context)

    def _require(self, name: str, *arguments: object) -> None:
        self._check(self._call(name, *arguments), name)

    def _call(self, name: str, *arguments: object) -> int:
        code: int = getattr(self._library, name)(*arguments)
        return code

    def _check(self, code: int, name: str) -> None:
        if code:
            raise DeviceError(f"{name}: {self._name(code)}")

    def _name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._call("cuGetErrorName", code, byref(text))
        return text.value.decode() if text.value else f"error {code}"
