"""Set-up of a process before it starts its role."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import setproctitle

import kvrelay
from kvrelay.config.cluster_config import ClusterSettings, ModelConfig, NodeConfig
from kvrelay.errors import ConfigError
from kvrelay.runtime.logging import set_up_logging

_OUR_PACKAGES = ("router", "kvstore", "cache_messager", "prefill_node", "decode_node")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def refuse_foreign_packages(root: Path | None = None) -> None:
    """Raise ConfigError if Python would import a ``router`` or other package of another project."""
    root = root or Path(kvrelay.__file__).parent.parent
    problems = []
    for name in _OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).parent if spec is not None and spec.origin else None
        if found is None or found.resolve() != (root / name).resolve():
            problems.append(
                f"package {name!r}: {found or 'nothing'} would be imported, not {root / name};"
                " install kvrelay into an environment of its own"
            )
    if problems:
        raise ConfigError(problems)


def name_process(role: str, name: str = "") -> None:
    """Set the process title to ``kvrelay ROLE NAME``."""
    setproctitle.setproctitle(f"kvrelay {role} {name}".rstrip())


def bind_to_cpus(node: NodeConfig) -> None:
    """Pin this process, and all it starts, to the node's CPUs and have the libraries it will load use its threads.

    Raises ConfigError if the machine does not have those CPUs.
    """
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(node.threads)
    if node.cpus is None:
        return
    missing = sorted(set(node.cpus) - os.sched_getaffinity(0))
    if missing:
        raise ConfigError([f"nodes.{node.name}.cpus: this process may not use CPU {', '.join(map(str, missing))}"])
    os.sched_setaffinity(0, node.cpus)


def require_checkpoint(model: ModelConfig) -> None:
    """Raise ConfigError if there is no checkpoint at ``model.path``."""
    if not (Path(model.path) / "config.json").is_file():
        raise ConfigError([f"model.path: no checkpoint in {model.path}; 'kvrelay model tiny DIR' creates a small one"])


def become(role: str, name: str, settings: ClusterSettings) -> None:
    """Set this process's title and log."""
    refuse_foreign_packages()
    name_process(role, "" if name == role else name)
    set_up_logging(name, settings.log_level, settings.log_format)
