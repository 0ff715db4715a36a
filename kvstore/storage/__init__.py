"""KV blocks outside the pools: for resumed requests, for the next turn of a chat, and for other nodes.

Life of a stored block:

1. ``put``: the value is packed from the caller's buffers: a header (``block_format``), then the bytes of every plane.
   The call ends when the block is stored, was stored already, or cannot be stored in time.
2. It is found by its key (geometry and block hash) by every node of the same model, on any host the backend reaches.
3. ``get``: it is read, checked against its header and only then copied to the caller's buffers. A value that fails the
   check is a miss, is counted and deleted.
4. It is dropped when the backend needs room (least recently used first), when its time to live is over, or by
   ``delete`` and ``clear``.

A store only saves work: any failure of it is a miss, and missed blocks are recomputed.
"""
