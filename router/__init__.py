"""Lifecycle of a request in the router.

1. ``openai`` parses and validates the HTTP request and makes one request per choice; ``responses`` and ``anthropic``
   make it of the requests of other APIs, and format its answers for them. ``text`` renders the chat
   template and tokenizes once. Nodes receive token ids only.
2. ``service`` posts Submitted to the machine in ``machine``. It admits all of them or none. Each admitted
   request gets exactly one terminal delivery, even if nodes fail.
3. ``admission`` refuses what would not be served, or not in time. The machine uses ``policies`` to choose a prefill
   (or mixed) node and a decode node from ``node_table``, sends Prefill or Generate, and delivers output tokens in index
   order (``output``). When a node fails or is lost, ``attempts`` retries on another node under a new epoch, continuing
   after the tokens already delivered. When a decode node refuses, ``decode_search`` finds another. When one preempts a
   request, ``moves`` moves it to a node with room. ``requests`` calls them. ``request_table`` holds the requests and
   ends them. ``nodes`` maintains the node table.
4. Each delivery goes through a queue to the HTTP handler of its client. ``text`` detokenizes and holds back
   text that may become part of a stop string. ``openai`` formats stream chunks or one response.
5. A client disconnect or a matched stop string is also an event: the machine aborts the request on both nodes.
6. ``timeline`` records the timelines of recent requests. ``metrics`` exports Prometheus metrics.
"""
