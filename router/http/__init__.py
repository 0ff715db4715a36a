"""The HTTP server: plain ASGI, without per-chunk overhead of a framework."""
