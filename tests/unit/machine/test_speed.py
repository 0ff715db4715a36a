"""Speeds as measured lately."""

from __future__ import annotations

import pytest

from kvrelay.machine.speed import Speed

NOW = 100.0


def test_nothing_is_known_before_the_first_measurement() -> None:
    assert Speed().at(NOW) is None


def test_it_is_what_was_done_by_the_time_it_took() -> None:
    speed = Speed()
    speed.add(900, 0.1, NOW)
    for _ in range(10):
        speed.add(10, 0.01, NOW)  # many small steps do not count more than their time
    assert speed.at(NOW) == pytest.approx(1000 / 0.2)


def test_old_measurements_count_less_and_less() -> None:
    speed = Speed()
    speed.add(1000, 1.0, NOW)
    speed.add(3000, 1.0, NOW + 5)
    assert speed.at(NOW + 5) == pytest.approx(2245, abs=1)  # e^-0.5 of the first
    for second in range(6, 60):
        speed.add(3000, 1.0, NOW + second)
    assert speed.at(NOW + 60) == pytest.approx(3000, abs=1)


def test_after_a_minute_it_is_unknown_again_and_begins_anew() -> None:
    speed = Speed()
    speed.add(1000, 1.0, NOW)
    assert speed.at(NOW + 59.9) == pytest.approx(1000)
    assert speed.at(NOW + 60.1) is None
    speed.add(5, 1.0, NOW + 61)
    assert speed.at(NOW + 61) == pytest.approx(5)


def test_what_took_no_time_is_no_division_by_zero() -> None:
    speed = Speed()
    speed.add(1, 0.0, NOW)
    assert speed.at(NOW) == pytest.approx(1e6)
