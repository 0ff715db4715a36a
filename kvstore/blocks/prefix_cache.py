"""The radix tree of published blocks, and their order of eviction.

**The tree.** A node is a block; its edge from its parent is one block of tokens. A textbook radix tree compresses runs
of tokens into one edge and must compare and split edges. Here a chained hash identifies the whole path from the root.
An edge is one comparison of hashes, and nodes are never split. A node's first child is stored in a flat list, which is
enough for most nodes; all other children share one dictionary by chained hash. Block ids are small integers, so a
million nodes are a few lists without work for the garbage collector. The blocks of one prompt are usually consecutive
in the pool and therefore adjacent in memory, which keeps the cost of a large tree close to that of a small one.

**Holders.** ``_holders[block]`` counts what prevents the eviction of a published block: 1 if it is referenced, and 1
for each child that is held itself. All ancestors of a held child are therefore held, even if they are not referenced.
They need not be: a request whose own first block duplicated a published one continues a chain that it never pinned.

**The order.** ``_evictable`` lists the blocks without holders in the order in which they lost the last one. A parent
loses its last holder only after all its children have, and leaves the list whenever one is held again: so every child
comes before its parent, and the front of the list is always the least recently used leaf. This is LRU over leaves with
O(1) per block: no heap, no search for leaves, and each parent enters once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.laws import Laws, Violation, parts_of
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_event_log import KVEventLog

_UNPUBLISHED = b""


class PrefixCache:
    """Published blocks of a pool of ``num_blocks``, found by chained block hash. It owns no references.

    Its owner reports the first reference to a published block (``hold``) and the loss of the last (``release``).
    """

    __slots__ = (
        "_evictable",
        "_first_child",
        "_hash_of",
        "_holders",
        "_other_children",
        "_parent_of",
        "_root",
        "changes",
        "events",
    )

    def __init__(self, num_blocks: int) -> None:
        # The root is the entry after the blocks. It has no parent, so as a child it means "none"; it holds itself,
        # so every walk towards it ends there.
        self._root = BlockId(num_blocks)
        self._hash_of = [_UNPUBLISHED] * (num_blocks + 1)
        self._parent_of = [self._root] * num_blocks
        self._first_child = [self._root] * (num_blocks + 1)
        self._other_children: dict[bytes, BlockId] = {}
        self._holders = [0] * num_blocks + [1]
        self._evictable: OrderedDict[BlockId, None] = OrderedDict()
        self.changes: dict[bytes, bool] | None = None
        """If not None: the hashes published (True) or removed (False) since its owner last emptied it."""
        self.events: KVEventLog | None = None
        """If not None: what is published and removed, with tokens, in order."""

    @property
    def num_evictable(self) -> int:
        """Published blocks without holders."""
        return len(self._evictable)

    def is_published(self, block: BlockId) -> bool:
        """Return whether ``block`` is in the tree."""
        return self._hash_of[block] != _UNPUBLISHED

    def published(self) -> list[bytes]:
        """Return the hashes of all published blocks. Looks at the whole tree."""
        return [block_hash for block_hash in self._hash_of if block_hash != _UNPUBLISHED]

    def count_evictable(self, block_ids: Sequence[BlockId]) -> int:
        """Return how many of ``block_ids`` are evictable."""
        return sum(map(self._evictable.__contains__, block_ids))

    def match(self, hashes: Sequence[bytes]) -> list[BlockId]:
        """Return the blocks of the longest published prefix of ``hashes``. No side effects."""
        return self._descend(self._root, hashes)

    def _descend(self, node: BlockId, hashes: Sequence[bytes]) -> list[BlockId]:
        """Return the published blocks below ``node`` on the path ``hashes``."""
        first_child, hash_of, other_children = self._first_child, self._hash_of, self._other_children
        path: list[BlockId] = []
        for block_hash in hashes:
            node = first_child[node]
            if hash_of[node] != block_hash:
                node = other_children.get(block_hash, self._root)
                if node == self._root:
                    break
            path.append(node)
        return path

    def num_settled(self, hashes: Sequence[bytes], block_ids: Sequence[BlockId]) -> int:
        """Return how many blocks there are up to the last of ``block_ids`` that is published under its hash already.

        Looks from the end, so it costs what is new and not what is long.
        """
        hash_of = self._hash_of
        for length in range(len(hashes), 0, -1):
            block = block_ids[length - 1]
            if block < self._root and hash_of[block] == hashes[length - 1]:
                return length
        return 0

    def insert(
        self,
        hashes: Sequence[bytes],
        block_ids: Sequence[BlockId],
        num_settled: int,
        token_ids: Sequence[int] = (),
    ) -> None:
        """Publish what is not published of ``block_ids[num_settled:]``, which must be referenced.

        ``token_ids``: of the whole sequence, for events.

        Raises LocalProtocolError if one of these blocks is published already, as a part of another prefix, or if
        the hashes repeat.
        """
        node = block_ids[num_settled - 1] if num_settled else self._root
        duplicated = self._descend(node, hashes[num_settled:])
        num_published = num_settled + len(duplicated)
        new_hashes, new_ids = hashes[num_published:], block_ids[num_published:]
        if new_ids:
            self._require_unpublished(new_hashes, new_ids)
            self._append(duplicated[-1] if duplicated else node, new_hashes, new_ids)
            if self.events is not None:
                self.events.stored(hashes, num_published, token_ids)

    def _append(self, parent: BlockId, hashes: Sequence[bytes], block_ids: Sequence[BlockId]) -> None:
        """Add a chain of referenced blocks below ``parent``."""
        self.hold([parent])
        if self.changes is not None:
            self.changes.update(dict.fromkeys(hashes, True))
        first_child, hash_of = self._first_child, self._hash_of
        parent_of, holders = self._parent_of, self._holders
        for block_hash, block in zip(hashes, block_ids, strict=True):
            if first_child[parent] == self._root:
                first_child[parent] = block
            else:
                self._other_children[block_hash] = block
            hash_of[block] = block_hash
            parent_of[block] = parent
            holders[block] = 2  # it is referenced, and the next one is its child
            parent = block
        holders[parent] = 1  # the last one has no child

    def _require_unpublished(self, hashes: Sequence[bytes], block_ids: Sequence[BlockId]) -> None:
        for block, block_hash in zip(block_ids, hashes, strict=True):
            known = self._hash_of[block]
            if known != _UNPUBLISHED:
                raise LocalProtocolError(
                    f"publish: block {block} is published as {known.hex()[:12]} already, not as {block_hash.hex()[:12]}"
                )
        if len(set(hashes)) < len(hashes):
            raise LocalProtocolError("publish: a chained block hash comes twice in one sequence")

    def hold(self, block_ids: Sequence[BlockId]) -> None:
        """Add a holder to each published block: it and all its parents are not evictable any more."""
        holders, parent_of, evictable = self._holders, self._parent_of, self._evictable
        for block in block_ids:
            node = block
            while True:
                held_by = holders[node] + 1
                holders[node] = held_by
                if held_by > 1:
                    break
                del evictable[node]
                node = parent_of[node]

    def release(self, block_ids: Sequence[BlockId]) -> list[BlockId]:
        """Take a holder from each published block, in the order given; return the blocks that are not published.

        Children before parents gives each block the shortest walk; any order gives the same tree.
        """
        hash_of, holders, parent_of, evictable = self._hash_of, self._holders, self._parent_of, self._evictable
        unpublished: list[BlockId] = []
        for block in block_ids:
            if hash_of[block] == _UNPUBLISHED:
                unpublished.append(block)
                continue
            node = block
            while True:
                held_by = holders[node] - 1
                holders[node] = held_by
                if held_by:
                    break
                evictable[node] = None
                node = parent_of[node]
        return unpublished

    def evict(self, num_blocks: int) -> list[BlockId]:
        """Remove the ``num_blocks`` least recently used evictable blocks from the tree; return them, children first.

        Raises LocalProtocolError, having evicted nothing, if there are not as many.
        """
        if not 0 <= num_blocks <= len(self._evictable):
            raise LocalProtocolError(f"evict {num_blocks} blocks: {len(self._evictable)} are evictable")
        pop_oldest = self._evictable.popitem
        evicted = [pop_oldest(last=False)[0] for _ in range(num_blocks)]
        first_child, hash_of, parent_of = self._first_child, self._hash_of, self._parent_of
        self._note_removed(evicted)
        for block in evicted:
            parent = parent_of[block]
            if first_child[parent] == block:
                first_child[parent] = self._root
            else:
                del self._other_children[hash_of[block]]
            hash_of[block] = _UNPUBLISHED
        return evicted

    def remove(self, first_hash: bytes) -> list[BlockId]:
        """Take all prefixes that begin with block ``first_hash`` out of the tree, referenced or not.

        Returns their blocks, which are as if they had never been published. Looks at the whole tree.
        """
        top = self.match([first_hash])
        if not top:
            return []
        if self._holders[top[0]]:
            self._holders[self._root] -= 1
        removed = self._below(top[0])
        for node in removed:
            parent = self._parent_of[node]
            if self._first_child[parent] == node:
                self._first_child[parent] = self._root
            else:
                del self._other_children[self._hash_of[node]]
            self._evictable.pop(node, None)
        self._note_removed(removed)
        for node in removed:
            self._hash_of[node] = _UNPUBLISHED
            self._holders[node] = 0
        return removed

    def clear(self) -> list[BlockId]:
        """Take all blocks out of the tree, referenced or not; return them. Looks at the whole tree."""
        removed = [BlockId(block) for block, name in enumerate(self._hash_of[: self._root]) if name != _UNPUBLISHED]
        if self.changes is not None:
            self.changes.update((self._hash_of[block], False) for block in removed)
        if self.events is not None:
            self.events.cleared()
        for block in (*removed, self._root):
            self._hash_of[block] = _UNPUBLISHED
            self._first_child[block] = self._root
            self._holders[block] = 0
        self._holders[self._root] = 1
        self._other_children.clear()
        self._evictable.clear()
        return removed

    def _note_removed(self, block_ids: Sequence[BlockId]) -> None:
        if self.changes is not None:
            self.changes.update((self._hash_of[block], False) for block in block_ids)
        if self.events is not None and block_ids:
            self.events.removed([self._hash_of[block] for block in block_ids])

    def _below(self, block: BlockId) -> list[BlockId]:
        """Return ``block`` and its descendants."""
        children: dict[BlockId, list[BlockId]] = {}
        for index, block_hash in enumerate(self._hash_of[: self._root]):
            if block_hash != _UNPUBLISHED:
                children.setdefault(self._parent_of[index], []).append(BlockId(index))
        found = [block]
        for node in found:
            found += children.get(node, ())
        return found

    def laws(self, is_referenced: Callable[[BlockId], bool]) -> Laws:
        """Check the tree, also with what the pool says is referenced; see ``kvrelay.machine.laws``."""
        return _TreeLaws(self).check(is_referenced)


class _TreeLaws:
    """The conservation laws of a tree."""

    def __init__(self, tree: PrefixCache) -> None:
        self._tree = tree

    def check(self, is_referenced: Callable[[BlockId], bool]) -> Laws:
        """Check all of them in parts."""
        tree, root = self._tree, self._tree._root
        num_held_children = [0] * (root + 1)
        num_published = 0
        num_edges = len(tree._other_children) + (tree._first_child[root] != root)
        for part in parts_of(root):
            for block in part:
                num_edges += tree._first_child[block] != root
                if tree._hash_of[block] != _UNPUBLISHED:
                    num_published += 1
                    num_held_children[tree._parent_of[block]] += tree._holders[block] > 0
            yield []
        if num_edges != num_published:
            yield [Violation(f"{num_published} published blocks, but {num_edges} children")]
        for part in parts_of(root):
            found: list[Violation] = []
            for block in map(BlockId, part):
                if tree._hash_of[block] != _UNPUBLISHED:
                    found += self._edge_violations(block)
                    found += self._holder_violations(block, num_held_children[block], is_referenced(block))
                elif block in tree._evictable:
                    found.append(Violation(f"block {block} is evictable but not published", block))
            yield found
        yield from self._order_laws()

    def _edge_violations(self, block: BlockId) -> Iterator[Violation]:
        tree = self._tree
        parent = tree._parent_of[block]
        if parent != tree._root and tree._hash_of[parent] == _UNPUBLISHED:
            yield Violation(f"published block {block} has an unpublished parent", block)
        if block not in (tree._first_child[parent], tree._other_children.get(tree._hash_of[block])):
            yield Violation(f"published block {block} is not among its parent's children", block)

    def _holder_violations(self, block: BlockId, num_held: int, is_referenced: bool) -> Iterator[Violation]:
        tree = self._tree
        holders = tree._holders[block]
        if holders != num_held + is_referenced:
            reference = "a" if is_referenced else "no"
            text = f"block {block} has {holders} holders, but {num_held} held children and {reference} reference"
            yield Violation(text, block)
        if (block in tree._evictable) is (holders > 0):
            state = "held but evictable" if holders else "neither held nor evictable"
            yield Violation(f"published block {block} is {state}", block)

    def _order_laws(self) -> Laws:
        tree = self._tree
        order = list(tree._evictable)
        seen = bytearray(tree._root + 1)
        for part in parts_of(len(order)):
            found = []
            for block in order[part.start : part.stop]:
                seen[block] = 1
                if seen[tree._parent_of[block]]:
                    found.append(Violation(f"evictable block {block} comes after its parent", block))
            yield found
