"""``python -m router CONFIG`` runs the router; the ``kvrelay`` command is the user interface for it."""

from __future__ import annotations

import sys

import uvloop

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.runtime.logging import log_event
from kvrelay.runtime.stop_signals import exit_on_stop_signals
from router.server import serve


def run(config: ClusterConfig) -> int:
    """Run the router of ``config`` until it is stopped; return the process's exit status."""
    reason = uvloop.run(serve(config))
    log_event("info", "router ended", {"reason": reason})
    return 0


if __name__ == "__main__":
    exit_on_stop_signals()
    sys.exit(run(ClusterConfig.load(sys.argv[1])))
