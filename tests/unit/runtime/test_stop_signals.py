"""What a process does when it is told to stop: while it starts, once its loop has taken over, and again."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from kvrelay.runtime.stop_signals import StopRequests

STARTING = """
import signal, sys
from kvrelay.runtime.stop_signals import exit_on_stop_signals
exit_on_stop_signals()
signal.signal(signal.SIGTERM, lambda *_: print("a library's handler", flush=True))
print("starting", flush=True)
try:
    while True: sum(range(1000))
except BaseException:
    print("interrupted", flush=True)
"""

TAKEN_OVER = """
import asyncio, os, signal
from kvrelay.runtime.stop_signals import exit_on_stop_signals, handle_stop_signals, ignore_stop_signals
exit_on_stop_signals()

async def main():
    told = asyncio.Event()
    handle_stop_signals(asyncio.get_running_loop(), told.set)
    os.kill(os.getpid(), signal.{name})
    await told.wait()
    ignore_stop_signals()

asyncio.run(main())
os.kill(os.getpid(), signal.{name})
print("cleaned up")
"""

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_process_that_starts_ends_at_once_whatever_handlers_there_are(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", STARTING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"

        process.send_signal(number)

        assert process.stdout.read() == ""
        assert process.wait() == 0


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_process_whose_loop_has_taken_over_cleans_up_and_is_not_disturbed(number: signal.Signals) -> None:
    script = TAKEN_OVER.format(name=number.name)

    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "cleaned up\n", "")


def test_a_signal_within_a_second_of_the_last_is_the_same_request() -> None:
    requests = StopRequests()

    assert [requests.is_new(now) for now in (10.0, 10.0, 10.9, 11.0, 11.5, 12.0)] == [
        *(True, False, False),
        *(True, False, True),
    ]
