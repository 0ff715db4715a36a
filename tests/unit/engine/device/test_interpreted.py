"""Runs the tests in ``interpreted`` in processes of their own, where Triton's kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kvrelay[torch] brings triton on Linux x86_64 only")

FOLDER = Path(__file__).parent / "interpreted"

Done = subprocess.CompletedProcess[str]


def run(path: Path) -> Done:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "500", str(path)]
    # The interpreter computes on one thread; more threads for the references would wait for each other.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> dict[Path, Done]:
    """What came of each file whose test is wanted. They run beside each other, as many at a time as there are cores."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    paths = [path for test in tests if isinstance(path := test.callspec.params["path"], Path)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(run, paths), strict=True))


@pytest.mark.timeout(3600)  # the first has to wait for all of them
@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py"), reverse=True), ids=lambda path: path.stem)
def test_kernels_equal_their_references(path: Path, runs: dict[Path, Done]) -> None:
    done = runs[path]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
