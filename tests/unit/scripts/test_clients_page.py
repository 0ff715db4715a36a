"""``docs/clients.md`` lists the scripts of ``scripts/clients``, each with the text of its second line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/clients.md").read_text()
ROWS = {row[2]: row for row in re.findall(r"^\| (.+) \| (.+) \| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)}
SCRIPTS = sorted(
    path.name for path in (ROOT / "scripts/clients").iterdir() if os.access(path, os.X_OK) and path.is_file()
)


def test_every_script_has_a_row_and_every_row_a_script() -> None:
    assert sorted(ROWS) == [name for name in SCRIPTS if name != "all"]


@pytest.mark.parametrize("name", ROWS)
def test_the_row_says_what_the_script_says(name: str) -> None:
    client, version, _, checked = ROWS[name]
    header = (ROOT / "scripts/clients" / name).read_text().splitlines()[1]
    assert header == f"# {client}: {checked}."
    assert re.match(r"\d+\.\d+", version)
