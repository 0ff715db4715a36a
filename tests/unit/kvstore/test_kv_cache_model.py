"""KVCache against a naive model of it, driven at random.

The model keeps plain sets and recomputes everything from their definitions each time: who is held, what is
evictable, which leaf is the oldest. Tokens come from two letters and blocks are one token, so that requests share,
branch off and duplicate all the time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from kvrelay.errors import LocalProtocolError
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache

HASHER = BlockHasher("model", block_size=1)


def hashes_of(text: str) -> list[bytes]:
    return HASHER.hashes([ord(letter) for letter in text])


@dataclass
class Model:
    """``published`` maps a prefix to its block; a prefix is the text from the first token on.

    ``withdrawn`` are blocks that somebody has and that are not published any more, whether or not they were.
    """

    num_blocks: int
    refs: dict[BlockId, int] = field(default_factory=dict)
    published: dict[str, BlockId] = field(default_factory=dict)
    idle_since: dict[str, int] = field(default_factory=dict)
    withdrawn: set[BlockId] = field(default_factory=set)
    operations: int = 0

    def held(self, prefix: str) -> bool:
        return any(self.refs.get(block, 0) for text, block in self.published.items() if text.startswith(prefix))

    def evictable(self) -> set[str]:
        return {prefix for prefix in self.published if not self.held(prefix)}

    def free(self) -> int:
        return self.num_blocks - len(set(self.refs) | set(self.published.values()))

    def match(self, text: str) -> list[BlockId]:
        prefixes = (text[: end + 1] for end in range(len(text)))
        return [self.published[prefix] for prefix in prefixes if prefix in self.published]

    def pin(self, blocks: list[BlockId]) -> None:
        for block in blocks:
            self.refs[block] = self.refs.get(block, 0) + 1
        self.note_idle()

    def unpin(self, blocks: list[BlockId]) -> None:
        for block in blocks:
            self.refs[block] -= 1
            if not self.refs[block]:
                del self.refs[block]
                self.withdrawn.discard(block)
        self.note_idle()

    def publish(self, text: str, blocks: list[BlockId]) -> None:
        for end, block in enumerate(blocks, start=1):
            if block in self.withdrawn:
                break
            self.published.setdefault(text[:end], block)
        self.note_idle()

    def note_idle(self) -> None:
        """Remember since when each prefix has been evictable."""
        self.operations += 1
        idle = self.evictable()
        self.idle_since = {prefix: self.idle_since.get(prefix, self.operations) for prefix in idle}

    def evict(self, victims: set[str], deficit: int) -> None:
        """Drop ``victims``; fail unless they are what an LRU over leaves takes, leaf by leaf."""
        assert len(victims) == deficit
        while victims:
            leaves = [
                prefix
                for prefix in self.evictable()
                if not any(text != prefix and text.startswith(prefix) for text in self.published)
            ]
            oldest = min(self.idle_since[prefix] for prefix in leaves)
            eligible = {prefix for prefix in leaves if self.idle_since[prefix] == oldest} & victims
            assert eligible, f"{victims} were evicted, the oldest leaves were {leaves}"
            victim = eligible.pop()
            victims.discard(victim)
            del self.published[victim]


@dataclass
class Request:
    text: str
    block_table: list[BlockId]


class Driver:
    """Does the same to a cache and to its model, and compares what both answer."""

    def __init__(self, num_blocks: int, rng: random.Random) -> None:
        self.cache = KVCache(num_blocks)
        self.model = Model(num_blocks)
        self.rng = rng
        self.requests: list[Request] = []
        self.readers: list[list[BlockId]] = []

    def admit(self) -> None:
        text = self.some_text(10)
        matched = self.cache.match(hashes_of(text))
        assert matched == self.model.match(text)
        needed = len(text) - len(matched)
        unmatched = {p for p in self.model.evictable() if self.model.published[p] not in matched}
        room = self.model.free() + len(unmatched)
        assert self.cache.can_allocate(needed, matched) == (needed <= room)
        self.cache.pin(matched)
        self.model.pin(matched)
        if needed <= room:
            self.requests.append(Request(text, matched + self.allocate(needed)))
            return
        with pytest.raises(LocalProtocolError, match=f"allocate {needed} blocks"):
            self.cache.allocate(needed)
        self.release(matched)

    def serve(self) -> None:
        """A whole short life at once, so that the cache fills up and evicts."""
        num_requests = len(self.requests)
        self.admit()
        if len(self.requests) > num_requests:
            request = self.requests.pop()
            self.publish_first(request, len(request.text))
            self.release(request.block_table)

    def publish(self) -> None:
        request = self.rng.choice(self.requests)
        self.publish_first(request, self.rng.randint(0, len(request.text)))

    def grow(self) -> None:
        request, letters = self.rng.choice(self.requests), self.some_text(3)
        if self.cache.can_allocate(len(letters)):
            request.block_table += self.allocate(len(letters))
            request.text += letters

    def start_reading(self) -> None:
        """Somebody reads a request's blocks from any block on, and may outlive it."""
        table = self.rng.choice(self.requests).block_table
        blocks = table[self.rng.randrange(len(table)) :]
        self.readers.append(blocks)
        self.cache.pin(blocks)
        self.model.pin(blocks)

    def end_reading(self) -> None:
        self.release(self.readers.pop(self.rng.randrange(len(self.readers))))

    def finish(self) -> None:
        self.release(self.requests.pop(self.rng.randrange(len(self.requests))).block_table)

    def clear(self) -> None:
        assert self.cache.clear() == len(self.model.published)
        self.model.published.clear()
        self.model.withdrawn.update(self.model.refs)
        self.model.note_idle()

    def forget(self) -> None:
        """Damage is found in what somebody reads, or in what nobody does."""
        text = self.some_text(10)
        self.cache.withdraw(hashes_of(text))
        for prefix in [prefix for prefix in self.model.published if prefix[0] == text[0]]:
            block = self.model.published.pop(prefix)
            if block in self.model.refs:
                self.model.withdrawn.add(block)
        self.model.note_idle()

    def misuse(self) -> None:
        block = BlockId(self.rng.randint(-1, self.model.num_blocks))
        if not self.model.refs.get(block):
            with pytest.raises(LocalProtocolError):
                self.cache.unpin([block])
            if block not in self.model.published.values():
                with pytest.raises(LocalProtocolError):
                    self.cache.pin([block])

    def some_text(self, longest: int) -> str:
        return "".join(self.rng.choices("ab", weights=[2, 1], k=self.rng.randint(1, longest)))

    def allocate(self, num_blocks: int) -> list[BlockId]:
        deficit = max(0, num_blocks - self.model.free())
        blocks = self.cache.allocate(num_blocks)
        self.model.evict({text for text in self.model.published if not self.is_published(text)}, deficit)
        assert len(set(blocks)) == num_blocks
        assert not set(blocks) & (set(self.model.refs) | set(self.model.published.values()))
        self.model.pin(blocks)
        return blocks

    def publish_first(self, request: Request, num_blocks: int) -> None:
        self.cache.publish(hashes_of(request.text[:num_blocks]), request.block_table[:num_blocks])
        self.model.publish(request.text[:num_blocks], request.block_table[:num_blocks])

    def release(self, blocks: list[BlockId]) -> None:
        self.cache.unpin(blocks)
        self.model.unpin(blocks)

    def is_published(self, text: str) -> bool:
        return self.cache.match(hashes_of(text))[len(text) - 1 :] == [self.model.published[text]]

    def step(self) -> None:
        operations = [self.admit, self.serve, self.serve, self.misuse]
        if self.requests:
            operations += [self.publish, self.publish, self.grow, self.start_reading, self.finish, self.finish]
        if self.readers:
            operations += [self.end_reading] * 2
        if self.rng.random() < 0.01:
            operations = [self.clear]
        elif self.rng.random() < 0.01:
            operations = [self.forget]
        self.rng.choice(operations)()

    def compare(self) -> None:
        self.cache.check_invariants()
        free, evictable = self.model.free(), len(self.model.evictable())
        assert (self.cache.num_free, self.cache.num_evictable) == (free, evictable)
        assert self.cache.num_referenced == len(self.model.refs)
        assert self.cache.num_used == self.model.num_blocks - free - evictable
        assert all(map(self.is_published, self.model.published))

    def end(self) -> None:
        for blocks in [request.block_table for request in self.requests] + self.readers:
            self.release(blocks)


@pytest.mark.parametrize("seed", range(37))
def test_kv_cache_agrees_with_the_model(seed: int) -> None:
    num_blocks = 4 + seed
    driver = Driver(num_blocks, random.Random(seed))
    for _ in range(300):
        driver.step()
        driver.compare()
    assert driver.cache.stats.evicted_blocks > num_blocks, "the walk must put the cache under pressure"
    driver.end()
    driver.compare()
    driver.cache.assert_quiescent()
    assert len(driver.cache.allocate(num_blocks)) == num_blocks
