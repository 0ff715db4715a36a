"""``python -m prefill_node CONFIG NAME`` runs one node; the ``kvrelay`` command does the same with more comfort."""

from __future__ import annotations

import sys

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.runtime.stop_signals import exit_on_stop_signals
from prefill_node.service import run

__all__ = ["run"]

if __name__ == "__main__":
    exit_on_stop_signals()
    sys.exit(run(ClusterConfig.load(sys.argv[1]), sys.argv[2]))
