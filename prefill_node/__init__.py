"""Life cycle of a request in the prefill node.

::

    QUEUED ──────────> RUNNING_PREFILL ──────────> SENDING ──────────> ENDED
    no blocks yet      owns blocks, chunk by       first token is      nothing uses
      │                chunk; D is asked for a     out; KV still on    its blocks
      │                reservation meanwhile       its way to D          ^
      │                     │                         │                  │
      └─────────────────────┴──────────> CLOSING <────┘──────────────────┘
                         over, but a plan in flight or the messager still uses its blocks

Between QUEUED and RUNNING_PREFILL a request may be LOADING: the store fills the first of its blocks.

A request that wants one token only, or whose first token ends it, never needs a decode node.

``machine`` is the state machine; ``admission``, ``steps``, ``reservations`` and ``storage`` are parts of it. ``policy``
and ``schedule`` decide who gets blocks and what a step computes, in the order of ``kvrelay.node.prefill_order``.
``request`` holds what P knows of one request, ``service`` runs it all in a process.
"""
