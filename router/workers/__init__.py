"""Life cycle of a worker: a process that serves clients for the router, which has the machine and the nodes.

The router starts it with one end of a pair of sockets and the listening socket that all workers share. It reads its
config (``Start``), loads the tokenizer, reports ``Ready`` and accepts connections from ``Serve`` on. What its clients
submit goes to the router, and what nodes answer comes back, as the machine's own events and deliveries. At ``Stop`` it
accepts no more connections, answers what comes on those there are, and ends when they have ended; at a second one it
does not wait for them. If it dies, the router aborts its requests and starts another; if the router dies, so does it.
"""
