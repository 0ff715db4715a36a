"""Packages import only what the design allows; the contracts are in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_import_order() -> None:
    lint = Path(sys.executable).with_name("lint-imports")

    outcome = subprocess.run([lint], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)

    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
