"""The wire protocol: ids, requests, KV geometry, messages, and the codec."""
