"""Life of a request in the router.

1. ``openai`` reads the HTTP request, refuses what is wrong with it and makes one request per choice out of it;
   ``text`` renders the chat template and tokenizes, once. Nodes see token ids only.
2. ``service`` posts Submitted to the machine in ``machine``. It admits all of them or none, and from then on owes
   each exactly one terminal delivery, whatever dies.
3. The machine asks ``policies`` for a prefill (or mixed) node and a decode node out of ``node_table`` and sends
   Prefill or Generate, then keeps every token it delivers, in the order of their index (``output``). When a node fails
   or is lost, ``attempts`` tries elsewhere under a new epoch, from the tokens already delivered on. When a decode node
   refuses, ``decode_search`` finds another; when one preempts a request, ``moves`` gives it to a node with room.
   ``requests`` calls them, ``request_table`` keeps the requests and ends each; ``nodes`` keeps the node table.
4. Each delivery goes through a queue to the HTTP handler of its client. ``text`` makes text of the tokens and holds
   back what a stop string may yet swallow; ``openai`` makes chunks or one answer of it.
5. A client that goes away, or a stop string, is an event like the others: the machine aborts both legs.
6. ``timeline`` keeps when what happened to the last requests, ``metrics`` counts.
"""
