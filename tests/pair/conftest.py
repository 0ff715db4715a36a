"""Every test of a World runs with one plan in flight and with two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import world


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of a module that uses a World twice, unless the module chooses the number of plans itself."""
    module = metafunc.module
    if hasattr(module, "World") and not getattr(module, "CHOOSES_PLANS_IN_FLIGHT", False):
        metafunc.fixturenames.append("plans_in_flight")
        metafunc.parametrize("plans_in_flight", [1, 2], indirect=True, ids=["one-plan", "two-plans"])


@pytest.fixture
def plans_in_flight(request: pytest.FixtureRequest) -> Iterator[int]:
    """Have the engines of all Worlds take as many plans at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "PLANS_IN_FLIGHT", request.param)
        yield request.param
