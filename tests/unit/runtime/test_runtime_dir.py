"""The directory of a killed process's sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from kvrelay.runtime.runtime_dir import VARIABLE, runtime_dir

HOLD = """
import time
from kvrelay.runtime.runtime_dir import runtime_dir
with runtime_dir() as directory:
    print(directory, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    env.pop(VARIABLE, None)
    foreign = tmp_path / "kvrelay-notes"
    foreign.mkdir()
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        assert holders[0].stdout is not None
        assert holders[1].stdout is not None
        dead, alive = (Path(holder.stdout.readline().strip()) for holder in holders if holder.stdout)
        (dead / "socket").touch()
        holders[0].send_signal(signal.SIGKILL)
        holders[0].wait(60)
        assert dead.is_dir()
        with runtime_dir(env) as mine:
            assert not dead.exists()
            assert set(tmp_path.iterdir()) == {foreign, alive, mine}
    finally:
        for holder in holders:
            holder.kill()
            holder.wait(60)
            assert holder.stdout is not None
            holder.stdout.close()
