"""Renamed config keys. An old name is accepted with a warning for one minor version (docs/compatibility.md)."""

from __future__ import annotations

RENAMED: dict[tuple[str, str], str] = {
    ("router", "prefill_policy"): "prefill_routing",  # 0.2.0
    ("router", "decode_policy"): "decode_routing",  # 0.2.0
}
"""(section, old name) -> new name. Remove an entry in the second minor version after the renaming."""
