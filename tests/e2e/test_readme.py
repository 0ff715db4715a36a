"""What the README prints for a shell to run works as printed: each block in a fresh shell, in the order of the page."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.cluster import PATIENCE_S, START_PATIENCE_S, until
from support.rooms import own_network

from kvrelay.cluster.addresses import taken_addresses
from kvrelay.config.cluster_config import ClusterConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

NOT_RUN = {"scripts/test": "it runs this test"}
"""Commands that are left out of their blocks, and why."""

COMMANDS = ("kvrelay", "scripts/", "source ", "curl ", ".venv/", "python ", "pip ", "docker ", "apt-get ")


def shell_blocks() -> list[str]:
    return [text for language, text in BLOCKS if language == "sh"]


def runnable(block: str) -> str:
    """Return ``block`` without the lines of NOT_RUN, and without those of a program that this machine has not."""
    lines = block.replace("\\\n", "").splitlines()
    missing = [] if shutil.which("curl") else ["curl"]
    return "\n".join(line for line in lines if line.split()[0] not in [*NOT_RUN, *missing])


def test_each_block_with_commands_is_marked_as_one_for_a_shell() -> None:
    unmarked = [text for language, text in BLOCKS if language != "sh" and text.startswith(COMMANDS)]

    assert unmarked == []
    assert len(shell_blocks()) == 3


@pytest.mark.timeout(400)
def test_the_shell_blocks_work_as_printed() -> None:
    demo, start, talk = map(runnable, shell_blocks())
    with network() as prefix:
        with Shell(demo, prefix) as shell:
            shell.wait_for("Ctrl-C ends it")
            assert "The red key is in drawer 86." in shell.output()
            hint = re.search(r"in another terminal: (.*)", shell.output())
            assert hint is not None
            with Shell(f"{hint[1]} Hello", prefix) as told:
                told.wait_for_end()

        with Shell(start, prefix) as shell:
            shell.wait_for("kvrelay | ready: ")
            with Shell(talk, prefix) as other:
                other.wait_for_end()
                for said in ("d2    decode   ready", "requests: ", "Noted" if "curl" not in talk else "data: [DONE]"):
                    assert said in other.output()


class Shell:
    """A block that runs in a fresh shell, in a session of its own; what is still running at the end gets Ctrl-C."""

    def __init__(self, block: str, prefix: list[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        path = [folder for folder in os.environ["PATH"].split(":") if not (Path(folder) / "kvrelay").exists()]
        self._process = subprocess.Popen(
            [*prefix, "bash", "--norc", "-e", "-c", block],
            cwd=ROOT,
            env={**environment, "PATH": ":".join(path), "NO_COLOR": "1", "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGINT)
            code = self._process.wait(PATIENCE_S)
            assert kind is not None or code == 0, self.output()
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            if kind is not None:
                print(self.output())
            self._log.close()

    def output(self) -> str:
        """Return what has been printed so far."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")  # it may end within a character

    def wait_for(self, text: str) -> None:
        """Wait until ``text`` has been printed."""

        def look() -> bool:
            ended = self._process.poll()
            assert ended is None or text in self.output(), f"ended with {ended}:\n{self.output()}"
            return text in self.output()

        until(text, look, START_PATIENCE_S)

    def wait_for_end(self) -> None:
        """Wait until all commands have been run, each with success."""
        assert self._process.wait(PATIENCE_S) == 0, self.output()


@contextmanager
def network() -> Iterator[list[str]]:
    """Give a network in which the README's ports are free: one of its own, else this machine's while nobody uses them.

    Other runs of this test wait for their turn.
    """
    with own_network() as prefix:
        if prefix is not None:
            yield prefix
            return
        with (Path(tempfile.gettempdir()) / f"kvrelay-readme-{os.getuid()}.lock").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            if taken := taken_addresses(ClusterConfig.load(ROOT / "configs/1p3d.yaml")):
                pytest.skip(f"no network of its own here, and others use these: {'; '.join(taken.values())}")
            yield []
