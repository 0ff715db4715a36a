"""Life cycle of a request in the prefill node.

::

    QUEUED ──────────> RUNNING_PREFILL ──────────> SENDING ──────────> ENDED
    no blocks yet      owns blocks, chunk by       first token is      nothing uses
      │                chunk; D is asked for a     out; KV still on    its blocks
      │                reservation meanwhile       its way to D          ^
      │                     │                         │                  │
      └─────────────────────┴──────────> CLOSING <────┘──────────────────┘
                         over, but a plan in flight, the messager or the store still uses its blocks

Between QUEUED and RUNNING_PREFILL a request may be LOADING: a read from the store fills the first of its blocks.

A request that wants one token only, or whose first token ends it, never needs a decode node.

``machine`` is the state machine; what all nodes do is in ``kvrelay.node.machine``. ``requests`` has all requests by
status (``queued`` is the container of the first one), ``endings`` ends them, ``admission`` gives them blocks, ``steps``
computes them, ``reservations`` hands them to D, ``storage`` reads from the store. ``policy`` and ``schedule`` decide
which request gets blocks and what a step computes, in the order of ``kvrelay.node.prefill_order``. ``request`` is one
request's state on P, ``service`` runs the machine in a process.
"""
