"""A router that checks itself while it is idle."""

import pytest
from driver import Driver, new_request

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.contract import TimerFired
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import FinishReason
from router.events import ClientGone
from router.nodes import LIVENESS


def served() -> Driver:
    """Return a router whose only request is over."""
    driver = Driver("p0 d0")
    driver.submit()
    driver.tokens("p0", 0, [10])
    driver.tokens("d0", 1, [11], finish=FinishReason.STOP)
    return driver


def beat(driver: Driver, times: int) -> None:
    for _ in range(times):
        driver.do(TimerFired(LIVENESS))


def test_an_idle_router_checks_itself_once_after_each_time_it_worked() -> None:
    driver = served()
    beat(driver, 9)
    assert driver.machine.counters["self_checks"] == 1
    assert driver.machine.counters["self_check_violations"] == 0
    driver.submit(new_request("next"))
    driver.do(ClientGone(RequestId("next")))
    beat(driver, 9)
    assert driver.machine.counters["self_checks"] == 2


def test_a_request_that_a_node_still_holds_is_found() -> None:
    driver = served()
    next(iter(driver.machine.node_table)).pending[RequestId("r0")] = None  # type: ignore[assignment]
    with pytest.raises(LocalProtocolError, match=r"self-check failed: .*held by nodes {'p0': \['r0'\]}"):
        beat(driver, 9)


def test_a_router_with_a_request_is_not_checked() -> None:
    driver = Driver("p0 d0")
    driver.submit()
    beat(driver, 9)
    assert driver.machine.counters["self_checks"] == 0
