"""The ``kvrelay`` command: starts, shows and queries a cluster. It does not depend on how roles work."""
