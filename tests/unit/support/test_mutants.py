"""Every mutant fits the sources, and its test exists. ``tests/mutation_check.py`` runs them."""

from __future__ import annotations

import ast

import pytest
from support.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.safeguard)
def test_a_mutant_can_be_applied_and_its_test_exists(mutant: Mutant) -> None:
    ast.parse(mutant.applied_to((ROOT / mutant.file).read_text()))
    file, name = mutant.test.split("[", maxsplit=1)[0].split("::")
    tests = ast.parse((ROOT / file).read_text()).body
    assert name in {node.name for node in tests if isinstance(node, ast.FunctionDef)}


def test_names_are_unique() -> None:
    assert len({mutant.safeguard for mutant in MUTANTS}) == len(MUTANTS)
