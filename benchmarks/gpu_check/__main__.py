"""``python -m gpu_check``: see ``--help``. Needs no network and no installed kvrelay."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_check.report import Report

PARTS = {
    "limits": 15,
    "kernels": 60,
    "golden": 90,
    "link": 70,
    "memory": 40,
    "float8": 40,
    "deterministic": 50,
    "decode": 60,
    "prefill": 40,
    "attention": 40,
    "gemm": 25,
    "sampling": 20,
    "cluster": 160,
}
"""Parts in their order, with the most seconds each may take: what checks, then whole steps, then parts of them."""

NEEDED = {"numpy": "numpy", "torch": "torch", "triton": "triton", "msgspec": "msgspec", "xxhash": "xxhash"}
"""What the engine imports, with the name of its package."""

ROOT = Path(__file__).resolve().parents[2]


class LateError(BaseException):
    """A part has taken all of its time."""


def main() -> int:
    """Run the parts that are asked for; return 1 if one failed."""
    options = _options()
    began = time.monotonic()
    if options.wheels is not None:
        _install(options.wheels)
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"missing: {' '.join(missing)}. Put their wheels into a folder and name it with --wheels", flush=True)
        return 1
    paths = [str(ROOT / "tests" / folder) for folder in ("unit/engine/device", "unit/engine", "")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for processes that compile
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="gpu-check-"))
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    from gpu_check.context import Context  # noqa: PLC0415
    from gpu_check.precompile import precompile  # noqa: PLC0415

    context = Context(report, device=options.device, tiny=options.tiny)
    context.describe()
    if options.device == "gpu":
        precompile(report)
    failed = [
        name for name in options.parts if not _run(name, context, 60 * options.minutes - time.monotonic() + began)
    ]
    report.finish(failed, time.monotonic() - began)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="stop beginning parts after so long")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    default = Path(os.environ.get("OUT") or "gpu-check-results")
    parser.add_argument("--out", type=Path, default=default, help="folder for results.json and results.md")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install, into a temporary folder, first")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts, for a rehearsal")
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def _install(wheels: Path) -> None:
    target = tempfile.mkdtemp(prefix="gpu-check-site-")
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, *files]
    subprocess.run(command, check=True)
    sys.path.insert(0, target)
    importlib.invalidate_caches()


def _run(name: str, context: Any, seconds_left: float) -> bool:
    """Run one part within its time; return whether it went well. What it found so far is kept in any case."""
    seconds = int(min(PARTS[name] * context.patience, seconds_left))
    if seconds < 10:
        print(f"## {name}: no time left", flush=True)
        return True
    print(f"## {name}: at most {seconds} s", flush=True)

    def late(_: int, __: FrameType | None) -> None:
        raise LateError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    began = time.monotonic()
    went_well = True
    try:
        importlib.import_module(f"gpu_check.{name}").run(context)
    except LateError:
        print(f"## {name}: stopped after {seconds} s", flush=True)
    except Exception:
        print(f"## {name} FAILED\n{traceback.format_exc()[-3500:]}", flush=True)
        went_well = False
    finally:
        signal.alarm(0)
    context.clean_up()  # now that no exception holds on to what the part had
    print(f"## {name}: {time.monotonic() - began:.1f} s", flush=True)
    return went_well


if __name__ == "__main__":
    raise SystemExit(main())
