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

``machine`` is the state machine; what all nodes do is in ``kvrelay.node.machine``. ``requests`` has all requests by
status (``waiting`` is a container of it), ``reservations`` answers P, ``storage`` saves and reads KV, ``steps`` starts
steps and takes their results. ``scheduler`` decides what a step computes. Its parts: ``admission`` (which request gets
blocks), ``preemption`` (which loses them), ``decodes`` (tokens and drafts of decodes), ``publishing`` (the prefix
cache). Its policies: ``kvrelay.node.headroom`` (blocks kept free for running requests), ``victim_order``,
``kvrelay.node.prefill_order`` (which prompt is next), ``resume_policy`` (reload or compute), ``speculate`` and
``ngram_index`` (drafts). ``schedule`` is one decision, ``request`` one request's state on D, ``service`` runs the
machine in a process.
"""
