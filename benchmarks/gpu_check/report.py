"""Results as they come: a line on the output, results.json after each of them, a table at the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Report:
    """Collects rows of (part, what, value, unit, limit, note)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = time.monotonic()
        self._facts: dict[str, Any] = {}
        self._rows: list[dict[str, Any]] = []

    def fact(self, name: str, value: Any) -> None:
        """Note something about the machine."""
        self._facts[name] = value
        print(f"# {name}: {value}", flush=True)
        self._write()

    def add(self, part: str, what: str, value: Any, unit: str = "", limit: float | None = None, note: str = "") -> None:
        """Add a row; ``limit`` is what arithmetic says cannot be beaten, in the same unit."""
        rounded = float(f"{value:.4g}") if isinstance(value, float) else value
        bound = None if limit is None else float(f"{limit:.4g}")
        row = {"part": part, "what": what, "value": rounded, "unit": unit, "limit": bound, "note": note}
        self._rows.append({**row, "at_s": round(time.monotonic() - self._began, 1)})
        shown = "" if bound is None else f"  (limit {bound})"
        print(f"{part}: {what}: {rounded} {unit}{shown} {note}".rstrip(), flush=True)
        self._write()

    def keep(self, name: str, text: str) -> None:
        """Append ``text`` to a file beside the results."""
        with (self._folder / name).open("a") as file:
            file.write(text)

    def finish(self, failed: list[str], seconds: float) -> None:
        """Write and print the table."""
        lines = [f"# {name}: {value}" for name, value in self._facts.items()]
        lines += ["", "| part | what | value | unit | limit | note |", "|---|---|---|---|---|---|"]
        for row in self._rows:
            cells = [row["part"], row["what"], row["value"], row["unit"], row["limit"], row["note"]]
            lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
        lines += ["", f"{seconds:.0f} s; failed parts: {', '.join(failed) or 'none'}"]
        text = "\n".join(lines)
        (self._folder / "results.md").write_text(text + "\n")
        print(text, flush=True)

    def _write(self) -> None:
        data = {"facts": self._facts, "rows": self._rows}
        (self._folder / "results.json").write_text(json.dumps(data, indent=1, default=str))
