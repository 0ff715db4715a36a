from __future__ import annotations

import pytest
from messager_pair import Pair


@pytest.fixture(params=[False, True], ids=["host", "device"])
def on_device(request: pytest.FixtureRequest) -> bool:
    """Whether pools are on a simulated device."""
    return bool(request.param)


@pytest.fixture
def pair_pools(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test of pairs with pools of either kind."""
    monkeypatch.setattr(Pair, "on_device", on_device)
