"""Service discovery through Redis: each node keeps an entry there, and routers read all entries.

The registry contains addresses only. Nodes and routers exchange heartbeats and load themselves.
"""
