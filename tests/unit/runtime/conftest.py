from __future__ import annotations

import math

import pytest


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long this machine stands still, shells tell no machine of it, as tests know which events there are."""
    monkeypatch.setattr("kvrelay.machine.liveness.PAUSE_S", math.inf)
