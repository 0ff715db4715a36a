"""``python -m kvrelay.cluster`` is the ``kvrelay`` command; the supervisor starts its children so."""

from kvrelay.cluster.cli import main

main()
