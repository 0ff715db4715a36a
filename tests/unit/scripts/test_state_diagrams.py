"""The page of state diagrams is what the transition tables say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def state_diagrams() -> ModuleType:
    spec = importlib.util.spec_from_file_location("state_diagrams", ROOT / "scripts" / "state_diagrams.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_tables_say(state_diagrams: ModuleType) -> None:
    committed = (ROOT / "docs" / "state-machines.md").read_text()
    told = "run: .venv/bin/python scripts/state_diagrams.py > docs/state-machines.md"
    assert committed == state_diagrams.page(), told


def test_every_table_in_the_code_is_on_the_page(state_diagrams: ModuleType) -> None:
    packages = ("router", "prefill_node", "decode_node", "cache_messager", "kvrelay", "kvstore")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    with_tables = {str(file.relative_to(ROOT)) for file in files if "\nTRANSITIONS: Table[" in file.read_text()}
    assert with_tables == {machine.file for machine in state_diagrams.machines()}


def test_every_status_is_drawn(state_diagrams: ModuleType) -> None:
    for machine in state_diagrams.machines():
        drawn = state_diagrams.diagram(machine)
        assert all(f" {status.value}" in drawn for status in machine.table), machine.title
