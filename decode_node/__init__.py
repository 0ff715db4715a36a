"""Life cycle of a request in the decode node and in the mixed node.

::

    from P                     RESERVING ───> RECEIVING ─────────────────────────┐
                               blocks set     P writes KV into them;             │
                               aside          the hand-off comes                 v
    from the router  WAITING ──────────────────────────> RUNNING_PREFILL ──> RUNNING_DECODE ──> ENDED
                     no blocks                           chunk by chunk          │   one token a step
                           │                                   ^                 v
                           └───────────> LOADING ──────────────┘             PREEMPTED
                                         the store fills                     no blocks; goes on
                                         the first blocks                    as WAITING does

    CLOSING follows any of them: over, but a plan in flight, the messager or the store still uses the blocks.

``state`` is the machine; ``requests`` (all of them, and how they end), ``reservations`` (what D has to do with P),
``storage`` (what it has to do with the store) and ``steps`` are parts of it. ``schedule`` decides what a step computes
and who gives way, with the policies of ``kvstore.reserve`` (what to keep free for running requests), ``preempt`` (who
is the victim), ``waiting`` and ``kvrelay.node.prefill_order`` (whose prompt is next), ``load`` (read or compute) and
``speculate`` (what to guess ahead); ``decodes`` and ``publishing`` are parts of it. ``request`` holds what D knows of
one request, ``service`` runs it all in a process.
"""
