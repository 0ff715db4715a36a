"""The process of one cache messager. It reads its settings as one line of JSON from standard input, which stays open.

Only nodes start it (``cache_messager.launch``). It exits when standard input is closed, because its node has ended. It
ignores SIGINT and SIGTERM, which often reach all processes of a cluster while the node still needs it to drain.
"""

from __future__ import annotations

import os
import signal
import sys

import msgspec
import setproctitle
import uvloop

from cache_messager.allocation import keep_freed_memory
from cache_messager.service import serve
from cache_messager.settings import MessagerSettings
from kvrelay.errors import PeerLostError
from kvrelay.protocol.ids import peer_name
from kvrelay.runtime.logging import log_event, set_up_logging


def main() -> int:
    """Serve until the node ends; return the process's exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # the node ended before it had written them
        return 0
    settings = msgspec.json.decode(line, type=MessagerSettings)
    name = peer_name(settings.node)
    setproctitle.setproctitle(f"kvrelay messager {name}")
    set_up_logging(f"{name}.messager", settings.log_level, settings.log_format)
    keep_freed_memory()
    os.sched_setaffinity(0, settings.cpus or range(os.cpu_count() or 1))
    try:
        reason = uvloop.run(serve(settings, sys.stdin.fileno()))
    except PeerLostError as error:  # the node ended before its pool was opened
        log_event("error", "not started", {"reason": str(error)})
        return 1
    log_event("info", "stopped", {"reason": reason})
    return 0


if __name__ == "__main__":
    sys.exit(main())
