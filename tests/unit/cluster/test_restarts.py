"""When a process that ended is started again: later and later, and not for ever."""

from __future__ import annotations

import signal

import pytest

from kvrelay.cluster.restarts import FAULTS, Life, RestartPolicy
from kvrelay.config.cluster_config import ClusterSettings

SETTINGS = ClusterSettings(restart_backoff_s=0.5, restart_backoff_max_s=3.0, max_crashes=3)


def killed(number: signal.Signals, lived_s: float = 0.1, *, was_ready: bool = True) -> Life:
    return Life(-number, lived_s, was_ready)


def test_the_wait_doubles_up_to_its_limit_and_starts_over_after_a_long_life() -> None:
    policy = RestartPolicy(SETTINGS)

    assert [policy.delay_after(Life(1, 0.1, True)) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert [policy.delay_after(Life(1, lived_s, True)) for lived_s in (3.1, 0.1)] == [0.5, 1.0]


@pytest.mark.parametrize(
    "life",
    [*(killed(number) for number in sorted(FAULTS)), killed(signal.SIGKILL, was_ready=False), Life(1, 0.1, False)],
    ids=lambda life: f"{life.ending.split(' (')[0]}, ready: {life.was_ready}",
)
def test_what_will_recur_is_not_tried_for_ever(life: Life) -> None:
    policy = RestartPolicy(SETTINGS)

    assert [policy.delay_after(life) for _ in range(3)] == [0.5, 1.0, None]
    assert policy.num_crashes == 3


@pytest.mark.parametrize(
    "life",
    [killed(signal.SIGKILL), Life(1, 0.1, True), Life(0, 0.1, True), Life(0, 0.1, False)],
    ids=["killed", "failed", "drained", "told to end while it started"],
)
def test_a_process_that_served_and_failed_otherwise_is_started_again_for_ever(life: Life) -> None:
    policy = RestartPolicy(SETTINGS)

    assert None not in [policy.delay_after(life) for _ in range(100)]


def test_only_crashes_in_a_row_count() -> None:
    policy = RestartPolicy(SETTINGS)
    fault, other = killed(signal.SIGSEGV), killed(signal.SIGKILL)

    assert None not in [policy.delay_after(life) for life in (fault, fault, other) * 10]
    assert None not in [policy.delay_after(killed(signal.SIGSEGV, lived_s=4000.0)) for _ in range(10)]


def test_the_first_crash_may_be_the_last() -> None:
    policy = RestartPolicy(SETTINGS.model_copy(update={"max_crashes": 1}))

    assert policy.delay_after(killed(signal.SIGILL)) is None


@pytest.mark.parametrize("number", [*sorted(FAULTS), signal.SIGKILL])
def test_the_ending_names_the_signal_and_the_likely_cause(number: signal.Signals) -> None:
    ending = killed(number).ending

    assert ending.startswith(f"was killed by {number.name} (")


def test_other_endings_are_told_as_they_are() -> None:
    assert Life(7, 0.1, True).ending == "exited with 7"
    assert killed(signal.SIGHUP).ending == "was killed by SIGHUP"
    assert Life(-63, 0.1, True).ending == "was killed by signal 63"
