"""Switches the safeguards of ``support.mutants`` off, one at a time, and checks that a test notices.

``.venv/bin/python tests/mutation_check.py [WORD ...]``: all, or those whose name contains a WORD. It works on a copy of
the sources: it runs the tests of all chosen mutants without any first, then each mutant with its test. It prints a
table and ends with 1 if a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from support.mutants import MUTANTS, ROOT, Mutant

PATIENCE_S = 600.0


def copy_sources(to: Path) -> None:
    """Copy what git knows or would add, with the built extensions."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    built = [path.relative_to(ROOT).as_posix() for path in (ROOT / "kvrelay").rglob("*.so")]
    for name in [*listed, *built]:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def passes(tests: Sequence[str], copy: Path) -> bool:
    """Run ``tests`` in the copy. Raises RuntimeError if they cannot be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S * len(tests),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{tests} cannot be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def check(mutant: Mutant, copy: Path) -> str:
    """Return what became of ``mutant``: ``killed`` or ``SURVIVED``."""
    file = copy / mutant.file
    sound = file.read_text()
    file.write_text(mutant.applied_to(sound))
    try:
        return "SURVIVED" if passes([mutant.test], copy) else "killed"
    finally:
        file.write_text(sound)


def main(words: Sequence[str]) -> int:
    """Check the mutants whose name contains one of ``words``; return the exit status."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.safeguard for word in words)]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="kvm-") as directory:
        copy = Path(directory)
        copy_sources(copy)
        if not passes(sorted({mutant.test for mutant in chosen}), copy):
            print("a test fails without any mutant")
            return 1
        for mutant in chosen:
            started_s = time.monotonic()
            outcomes.append(check(mutant, copy))
            seconds = time.monotonic() - started_s
            print(f"{outcomes[-1]:8} {seconds:5.0f} s  {mutant.safeguard}: {mutant.test}", flush=True)
    print(f"{outcomes.count('killed')} of {len(chosen)} mutants killed")
    return int(outcomes.count("killed") < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
