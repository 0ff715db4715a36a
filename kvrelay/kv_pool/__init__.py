"""The KV pool of a node: its interface, and its implementation in host memory."""
