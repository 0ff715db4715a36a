"""KV blocks stored outside the pools, for resumed requests, later turns of a chat, and other nodes.

Lifecycle of a stored block:

1. ``put``: the value is packed from the caller's buffers: a header (``block_format``), then the bytes of every plane.
The call returns when the block is stored, was already stored, or the deadline has passed.
2. Every node of the same model can find it by its key (geometry and block hash), on any host the backend reaches.
3. ``get``: it is read, checked against its header and only then copied to the caller's buffers. A value that fails the
   check counts as a miss and is deleted.
4. It is dropped when the backend needs room (least recently used first), when its time to live has expired, or by
   ``delete`` and ``clear``.

A store only saves work: any failure of it is a miss, and missed blocks are recomputed.
"""
