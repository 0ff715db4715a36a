"""Families of Prometheus metrics that the router and the nodes have in common: kvrelay's names and vLLM's."""
