"""KV blocks: ``blocks`` on the node, ``offload`` between node and store, ``storage`` backends. No scheduling policy."""
