"""HTTP: plain ASGI, nothing between a token and its socket that costs per chunk."""
