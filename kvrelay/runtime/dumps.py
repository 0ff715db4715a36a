"""The recording of this process and its files: written for an operator, or because the process crashes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from kvrelay.recording.event_codec import EventCodec
from kvrelay.recording.recorder import Handle, Recorder, Recording
from kvrelay.recording.recording_file import default_directory, write
from kvrelay.recording.settings import RecordingSettings
from kvrelay.runtime.logging import log_event

_MAX_CRASH_TEXT = 1000


class Written(NamedTuple):
    """The ``path`` of a file of ``process``, or an ``error``; the other is empty."""

    process: str
    path: str
    error: str


class Dumps:
    """Records what a machine handles, and writes it to files.

    ``process``: its name in the cluster. ``start``: what the machine of ``role`` was made from.
    """

    def __init__(
        self, process: str, role: str, start: object, codec: EventCodec, settings: RecordingSettings | None = None
    ) -> None:
        self._process = process
        self._settings = settings = settings or RecordingSettings()
        self._recorder = Recorder(process, role, start, codec, settings) if settings.max_bytes else None

    def recorded(self, handle: Handle) -> Handle:
        """Return ``handle`` with a record of each call."""
        return handle if self._recorder is None else self._recorder.recorded(handle)

    async def write(self, *, prompts: bool) -> Written:
        """Write what is remembered now to a file. A thread does it, so that the loop runs on."""
        if self._recorder is None:
            return Written(self._process, "", "recording.max_bytes is 0: nothing is recorded")
        recording = self._recorder.recording()
        try:
            path = await asyncio.to_thread(self._write, recording, prompts=prompts)
        except OSError as error:
            return Written(self._process, "", f"cannot write the recording: {error}")
        except Exception as error:  # who asks is answered, and the type is all that is known to hold no prompt
            return Written(self._process, "", f"cannot write the recording: {type(error).__name__}")
        log_event("info", "recording written", {"path": str(path), "prompts": prompts})
        return Written(self._process, str(path), "")

    def write_crash(self, error: Exception) -> None:
        """Write what is remembered to a file because of ``error``. If that fails, it is only logged."""
        if self._recorder is None:
            return
        try:
            crash = describe(error)
            path = self._write(self._recorder.recording(), prompts=self._settings.prompts, crash=crash)
        except Exception as failed:  # the process ends with the first error, not with this one
            log_event("error", "recording not written", {"reason": repr(failed)})
        else:
            log_event("error", "recording of the crash", {"path": str(path), "prompts": self._settings.prompts})

    def _write(self, recording: Recording, *, prompts: bool, crash: str | None = None) -> Path:
        given = self._settings.directory
        directory = Path(given) if given is not None else default_directory()
        return write(recording, directory / self._settings.cluster, prompts=prompts, crash=crash)


def describe(error: Exception) -> str:
    """Return type and text of ``error``, as a file of a crash has them: what is no text is escaped, the rest cut."""
    text = f"{type(error).__name__}: {error}"
    return text.encode(errors="backslashreplace").decode()[:_MAX_CRASH_TEXT]
