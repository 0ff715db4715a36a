"""The KV blocks of one node: who holds which, which are worth keeping, and what they are called.

Life of a block:

1. **free**: on the free list of the ``block_pool``; its contents mean nothing.
2. **used**: allocated to a request. Every owner holds one reference (``pin``, ``unpin``): the request, and each
   transfer, storage write or step that still reads or writes the block. With the last reference it becomes free again.
3. **used and published**: its contents are computed or verified, and the ``prefix_cache`` finds it by its block hash
   (``block_hash``). Requests with the same prefix pin it instead of computing it.
4. **evictable**: published, and neither it nor anything that continues it is referenced. It stays matchable until it is
   pinned again, or evicted because somebody needs a free block: longest unused first.

``kv_cache`` puts the parts together; it is the one object that the nodes' machines use.
"""
