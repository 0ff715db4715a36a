"""The section ``recording``: what each process remembers of the events that it has handled."""

from __future__ import annotations

from pydantic import Field

from kvrelay.config.base import Section, SizeBytes


class RecordingConfig(Section):
    """The recording of the last events that each process keeps in memory, and its files."""

    max_bytes: SizeBytes = Field(
        4 << 20,
        ge=0,
        le=1 << 36,
        description="Memory of each process for its last events, in bytes (also 4MiB); 0: no recording.",
    )
    actions: bool = Field(
        False,
        description="Also keep what each event led to, in full; without, only the types of the actions. A replay then "
        "compares all of it. Costs more time and memory.",
    )
    prompts: bool = Field(
        False,
        description="Write prompts and outputs into the file of a crash, which can only then be replayed; kvrelay dump "
        "has an option for it.",
    )
    directory: str | None = Field(
        None,
        min_length=1,
        description="Directory of the files, with a directory for each cluster in it; default: kvrelay/recordings in "
        "XDG_STATE_HOME or in ~/.local/state.",
    )
