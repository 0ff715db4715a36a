"""Transfers between a node's pool and its store, as the node's state machine knows them."""
