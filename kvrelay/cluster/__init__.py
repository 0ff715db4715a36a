"""The ``kvrelay`` command: starting, watching and talking to a cluster. Knows no role from the inside."""
