"""The KV blocks of one node: allocation, reference counts, block hashes and the prefix cache.

States of a block:

1. **free**: on the free list of the ``block_pool``. Its content is undefined.
2. **used**: allocated to a request. Each request that uses it holds one reference (``pin``, ``unpin``), and so does a
   copy to the store's staging memory. A request keeps its reference until its transfer, its plans in flight and its
   reads from the store are done. Without references the block becomes free, unless it is published.
3. **used and published**: its content is computed or verified, and the ``prefix_cache`` finds it by its block hash
   (``block_hash``). Requests with the same prefix pin it instead of computing it.
4. **evictable**: published, and neither it nor a block that continues it is referenced. It stays matchable until it is
   pinned again, or evicted because a free block is needed. The least recently used block is evicted first.

``kv_cache`` combines the parts. It is the only object that the nodes' machines use.
"""
