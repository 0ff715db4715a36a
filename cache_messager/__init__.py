"""Lifecycle of a KV transfer in the cache messager.

Every prefill and decode node has one messager: a process of its own, without Paddle, that maps the node's KV pool and
moves blocks from P's pool to D's while both nodes compute::

    P node          P's messager                      D's messager          D node
                                                      expect blocks  <----- ExpectKV
                                                                     -----> KVExpected
    LayerSignal --> keep or send
    OpenTransfer -> LinkHello with offers ----------> LinkAccepted: one of them
                    frames within the credit -------> verify, write once
                    free credit  <------------------- FrameAck
    <-------------- TransferDone                      all written    -----> KVArrived

A transfer on the sending side is PENDING (signals, no OpenTransfer yet), SENDING, DRAINING (failed or closed, frames
still unacknowledged: P's blocks may still be read), ENDED. An expectation on the receiving side is RECEIVING, DRAINING
(failed or cancelled, with a write still under way), ENDED. Blocks are reported free only after draining.

``machine`` composes ``sender`` and ``receiver`` into the machine. The sender's parts are ``transfers``,
``frame_sender`` and ``sender_links``, the receiver's ``expectations`` and ``receiver_links``. ``links`` implement
the ways to move the bytes, and ``mover`` performs the machine's actions with them. ``service`` is the shell of the
process, ``launch`` starts it from a node.
"""
