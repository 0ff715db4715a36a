"""The ``kvrelay`` command. ``python -m kvrelay.cluster`` is the same; the supervisor starts its children with it."""

from __future__ import annotations

import sys

from kvrelay.runtime.stop_signals import exit_on_stop_signals

_SERVING = ("up", "router", "prefill", "decode", "mixed")
"""Commands that run until they are told to stop."""


def main() -> None:
    """Run the command and exit."""
    if sys.argv[1:2] and sys.argv[1] in _SERVING:
        exit_on_stop_signals()
    from kvrelay.cluster import cli  # noqa: PLC0415 - takes most of a second, in which the process may be told to stop

    cli.main()


if __name__ == "__main__":
    main()
