"""When a machine checks its conservation laws, and what it does about a violation."""

from __future__ import annotations

import pytest

from kvrelay.config.self_check_mode import SelfCheckMode
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import CoreAction, Log
from kvrelay.machine.laws import Laws, Violation
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.machine.self_check import SelfCheck


class Checked:
    """A machine whose laws have three parts; ``violations`` are what the second finds."""

    def __init__(self, mode: SelfCheckMode = "report") -> None:
        self.outbox: RoleOutbox[CoreAction] = RoleOutbox()
        self.violations: list[Violation] = []
        self.parts_made = 0
        self.check = SelfCheck(mode, self.laws, self.outbox, lambda block: [f"allocate of {block}"])

    def laws(self) -> Laws:
        for part in ([], self.violations, []):
            self.parts_made += 1
            yield part

    def beat(self, activity: int | None, times: int = 1) -> list[Log]:
        for _ in range(times):
            self.check.beat(activity)
        return [action for action in self.outbox.take() if isinstance(action, Log)]


def test_one_part_is_made_at_each_beat_and_nothing_more_until_something_has_changed() -> None:
    checked = Checked()
    made = []
    for _ in range(7):
        checked.beat(1)
        made.append(checked.parts_made)
    assert made == [0, 1, 2, 3, 3, 3, 3], "the first beat only notes that the machine is idle"
    assert checked.check.counters == {"self_checks": 1, "self_check_violations": 0}
    checked.beat(2, times=5)
    assert checked.parts_made == 6
    assert checked.check.num_checks == 2


@pytest.mark.parametrize("activity", [None, 2])
def test_a_check_begins_anew_when_the_machine_did_something_between_its_parts(activity: int | None) -> None:
    checked = Checked()
    checked.beat(1, times=3)
    checked.beat(activity)
    checked.beat(1, times=3)
    assert checked.parts_made == 4
    assert checked.check.num_checks == 0


def test_a_violation_is_counted_and_logged_once_with_the_history_of_its_block() -> None:
    checked = Checked()
    checked.violations = [Violation("a request is left"), Violation("block 7 is lost", block=7)]
    (line,) = checked.beat(1, times=6)
    assert line.level == "error"
    assert line.event == "self-check failed"
    assert line.fields == {
        "violations": ["a request is left", "block 7 is lost"],
        "self_check_violations": 2,
        "block": 7,
        "history": ["allocate of 7"],
    }
    assert checked.beat(2, times=6) == [], "one line a minute"
    assert checked.check.num_violations == 4
    checked.outbox.now += 61.0
    assert len(checked.beat(3, times=6)) == 1


def test_a_violation_ends_the_process_if_it_is_to_be_fatal() -> None:
    checked = Checked("fatal")
    checked.violations = [Violation("block 7 is lost", block=7)]
    checked.beat(1, times=2)
    with pytest.raises(LocalProtocolError, match="self-check failed: block 7 is lost"):
        checked.beat(1)


def test_nothing_is_checked_if_it_is_off() -> None:
    checked = Checked("off")
    checked.beat(1, times=9)
    assert checked.parts_made == 0
