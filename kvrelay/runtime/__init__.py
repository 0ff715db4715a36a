"""Runs a machine in a process: the shell, sockets, the compute thread, signals, logs."""
