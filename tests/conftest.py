"""What holds for every test: nothing may be left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import uvloop
import zmq
from hypothesis import HealthCheck, settings
from support.faults import FAULTS
from support.leaks import Belongings

pytest_plugins = ["support.cluster_fixtures"]

os.environ.setdefault("KVRELAY_CLUSTER__LOG_FORMAT", "text")  # tests read what processes write

# Reproducible, and no files: a failing example belongs into the test as an @example. How long examples take to be made
# or to run depends on what else this machine does.
settings.register_profile(
    "kvrelay", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kvrelay")


@pytest.fixture(scope="session", autouse=True)
def runtime_dir() -> Iterator[None]:
    """Let every process started here keep its sockets in a directory of this test run, where leaks show.

    Recordings go to another: those of crashes are left behind on purpose.
    """
    with (
        tempfile.TemporaryDirectory(prefix="kvt-") as path,
        tempfile.TemporaryDirectory(prefix="kvt-state-") as state,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_RUNTIME_DIR", path)
        patch.setenv("XDG_STATE_HOME", state)
        yield


@pytest.fixture(scope="session", autouse=True)
def libraries_own_things() -> None:
    """Let libraries make what they keep for the life of the process, so that no test is blamed for it."""
    uvloop.new_event_loop().close()  # pipes for signals
    with zmq.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
        # pyzmq's thread that releases buffers sent without copying
        push.bind("inproc://warm-up")
        pull.connect("inproc://warm-up")
        push.send(bytearray(1 << 20), copy=False)
        pull.recv()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, runtime_dir: None, libraries_own_things: None) -> Iterator[None]:
    """Fail a test that leaves a process, thread, socket, shared memory or runtime file behind."""
    before = Belongings.now()
    yield
    # Mooncake's library makes and drops event loops of its own at times of its own.
    leaked = before.leaked(but="anon_inode:" if "mooncake" in request.node.nodeid else None)
    if leaked:
        pytest.fail("left behind: " + ", ".join(leaked), pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this suite."""
    parser.addoption("--regenerate-golden", action="store_true", help="write golden files anew from what the code does")
    parser.addoption("--fault", choices=sorted(FAULTS), help="run only the tests of this fault")
    parser.addoption("--schedules", type=int, help="how many random schedules of each kind the pair tests run")
    parser.addoption("--first-seed", type=int, default=0, help="the seed of the first of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse unknown faults, and leave out the tests of others if one is asked for."""
    wanted = config.getoption("--fault")
    faults = {item: {fault for mark in item.iter_markers("fault") for fault in mark.args} for item in items}
    for item, marked in faults.items():
        if not marked <= FAULTS.keys() or any(mark.kwargs or not mark.args for mark in item.iter_markers("fault")):
            raise pytest.UsageError(f"{item.nodeid}: there is no such fault: {sorted(marked)}")
    if wanted is not None:
        left_out = [item for item in items if wanted not in faults[item]]
        items[:] = [item for item in items if wanted in faults[item]]
        config.hook.pytest_deselected(items=left_out)
