"""docs/faults.md says which tests cover which fault, and every fault has some."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from support.faults import FAULTS, marked_tests

ROOT = Path(__file__).parents[3]

ON_PROCESSES = ["F08", "F09", "F13", "F20", "F28", "F30"]
"""Faults of processes, signals and sockets, which a simulation alone does not show."""


@pytest.fixture(scope="module")
def fault_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fault_table", ROOT / "scripts" / "fault_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_markers_say(fault_table: ModuleType) -> None:
    committed = (ROOT / "docs" / "faults.md").read_text()
    told = "run: .venv/bin/python scripts/fault_table.py > docs/faults.md"
    assert committed == fault_table.page(), told


def test_every_fault_has_tests_and_every_marker_names_a_fault() -> None:
    found = marked_tests()
    assert [fault for fault, tests in found.items() if not tests] == []
    assert list(found) == list(FAULTS)


@pytest.mark.parametrize("fault", ON_PROCESSES)
def test_faults_of_processes_are_tested_on_processes(fault: str) -> None:
    assert [file for file, _ in marked_tests()[fault] if file.startswith(("cluster/", "e2e/"))]
