"""What processes send each other: ids, requests, KV geometry, every message, and the codec."""
