"""lm-eval against kvrelay and against transformers: the same log likelihoods to 1e-3 from a tiny checkpoint.

Three tasks of local data go through lm-eval's ``simple_evaluate``: log likelihood of one continuation, multiple choice
and rolling perplexity. Its model ``local-completions`` asks a cluster of one prefill and one decode node for them, its
model ``hf`` computes them with transformers from the same files. lm-eval, transformers and torch are installed into an
environment of their own on the first run (``PIP_FIND_LINKS`` or ``UV_INDEX`` may name where torch's CPU build is).

Usage: python scripts/clients/lm_eval_harness.py [--arch llama] [--environment .cache/clients/lm_eval]

Ends with status 1 if any value differs by more than 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from support.running_cluster import cluster_config, running  # noqa: E402

from kvrelay.engine.tiny import write_tiny_checkpoint  # noqa: E402

JOB = Path(__file__).with_name("lm_eval_job.py")
PACKAGES = ("lm-eval[api,hf]==0.4.13", "torch==2.13.0+cpu", "transformers<6")
TOLERANCE = 1e-3
MAX_LENGTH = 128

Values = dict[str, list[float]]
"""For each task, the log likelihoods in the order of its requests."""


def make_environment(path: Path) -> Path:
    """Install lm-eval into an environment at ``path``, unless that is done; return its Python."""
    python = path / "bin" / "python"
    if python.exists() and not subprocess.run([python, "-c", "import lm_eval, torch"], check=False).returncode:
        return python
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    variables = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""), **os.environ}
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(path)], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    subprocess.run([*install, *PACKAGES], check=True, env=variables)
    return python


def evaluate(python: Path, model: str, arguments: dict[str, object], tasks: Path) -> Values:
    """Return what lm-eval's ``model`` gives for the tasks in ``tasks``."""
    command = [str(python), str(JOB), model, json.dumps(arguments), str(tasks)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **offline})
    found: Values = json.loads(done.stdout.splitlines()[-1])
    return found


def furthest(ours: Values, theirs: Values) -> float:
    """Print both and return the largest difference."""
    differences = [0.0]
    for task, values in ours.items():
        if len(values) != len(theirs[task]):
            raise ValueError(f"{task}: {len(values)} values from kvrelay, {len(theirs[task])} from transformers")
        largest = max(abs(one - other) for one, other in zip(values, theirs[task], strict=True))
        differences.append(largest)
        print(f"{task:16} {len(values):3} log likelihoods, the furthest {largest:.2e} apart; the first {values[0]:.5f}")
    return max(differences)


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="llama")
    parser.add_argument("--environment", type=Path, default=ROOT / ".cache" / "clients" / "lm_eval")
    options = parser.parse_args()
    python = make_environment(options.environment)
    with tempfile.TemporaryDirectory(prefix="kvrelay-lm-eval-") as name:
        tasks, model = Path(name) / "tasks", Path(name) / "model"
        tasks.mkdir()
        write_tiny_checkpoint(model, options.arch)
        nodes = {"p0": {"role": "prefill"}, "d0": {"role": "decode"}}
        sections = {
            "model": {"path": str(model), "served_name": "tiny", "dtype": "float32"},
            "cache": {"num_blocks": 256},
            "scheduler": {"max_num_batched_tokens": 64},
        }
        remote = {"tokenizer": str(model), "max_length": MAX_LENGTH, "num_concurrent": 4, "batch_size": 3}
        with running(cluster_config(nodes, sections)) as cluster:
            url = f"{cluster.url}/v1/completions"
            ours = evaluate(python, "local-completions", {"model": "tiny", "base_url": url, **remote}, tasks)
        # Of an API model one place is for the token that it generates, and in rolling windows one is for their context.
        local = {"pretrained": str(model), "dtype": "float32", "device": "cpu", "max_length": MAX_LENGTH - 2}
        theirs = evaluate(python, "hf", local, tasks)
    largest = furthest(ours, theirs)
    print("equal" if largest <= TOLERANCE else f"DIFFERENT: more than {TOLERANCE:g} apart")
    return int(largest > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
