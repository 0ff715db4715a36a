"""Settings of a recording. Imports no pydantic: a messager has them too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    from kvrelay.config.recording import RecordingConfig


class RecordingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The section ``recording`` of the config."""

    max_bytes: int = 4 << 20
    actions: bool = False
    prompts: bool = False
    directory: str | None = None

    @classmethod
    def of(cls, config: RecordingConfig) -> Self:
        """Return the settings in ``config``."""
        return cls(
            max_bytes=config.max_bytes,
            actions=config.actions,
            prompts=config.prompts,
            directory=config.directory,
        )
