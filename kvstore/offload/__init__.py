"""Copies between a node's pool and its store: what is on its way, and what the store has already."""
