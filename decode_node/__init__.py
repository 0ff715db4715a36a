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

``machine`` is the state machine. Its parts: ``requests`` (all of them, and how they end), ``reservations`` (with
P), ``storage`` (offload and reload of KV) and ``steps``. ``schedule`` decides what a step computes and which request is
preempted, with the policies of ``kvrelay.node.headroom`` (blocks kept free for running requests), ``preempt`` (the
victim), ``waiting`` and ``kvrelay.node.prefill_order`` (whose prompt is next), ``resume_policy`` (reload or compute),
``speculate`` (drafts); ``decodes`` and ``publishing`` are parts of it. ``request`` is one request's state on D,
``service`` runs the machine in a process.
"""
