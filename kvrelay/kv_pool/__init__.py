"""A node's memory for KV blocks: the interface that everybody uses, and its implementation in host memory."""
