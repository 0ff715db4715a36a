"""``QueuedPrefixes``: what the prefix cache has of queued requests, followed as blocks are published."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvstore.blocks.kv_cache import KVCache
from kvstore.blocks.queued_prefixes import QueuedPrefixes


@dataclass(eq=False)
class Request:
    reusable_hashes: list[bytes]
    told: list[int] = field(default_factory=list)


def hashes(text: str) -> list[bytes]:
    """Return chained hashes: each is of all that comes before it too."""
    return [text[: end + 1].encode() for end in range(len(text))]


def followed(kv: KVCache) -> QueuedPrefixes[Request]:
    return QueuedPrefixes(kv, lambda request, num_matched: request.told.append(num_matched))


def publish(kv: KVCache, prefixes: QueuedPrefixes[Request], text: str) -> None:
    matched = kv.match(hashes(text))
    kv.pin(matched)
    blocks = [*matched, *kv.allocate(len(text) - len(matched))]
    kv.publish(hashes(text), blocks)
    kv.unpin(blocks)
    prefixes.published(hashes(text))


def test_a_request_is_told_of_when_the_block_it_lacks_is_published() -> None:
    kv = KVCache(16)
    prefixes = followed(kv)
    request, other = Request(hashes("abcd")), Request(hashes("xy"))
    assert (prefixes.add(request), prefixes.add(other)) == (0, 0)
    assert prefixes.lacks(request) == b"a"
    publish(kv, prefixes, "ab")
    assert (request.told, other.told) == ([2], [])
    assert prefixes.lacks(request) == b"abc"
    publish(kv, prefixes, "abq")
    assert request.told == [2]
    publish(kv, prefixes, "abcd")
    assert request.told == [2, 4]
    assert prefixes.lacks(request) is None


def test_an_eviction_is_noticed_when_it_is_matched_again() -> None:
    kv = KVCache(2)
    prefixes = followed(kv)
    publish(kv, prefixes, "ab")
    request = Request(hashes("ab"))
    assert prefixes.add(request) == 2
    kv.clear()
    assert (prefixes.match(request), request.told) == ([], [0])
    publish(kv, prefixes, "a")
    assert request.told == [0, 1]


def test_a_request_that_left_is_told_of_no_more() -> None:
    kv = KVCache(4)
    prefixes = followed(kv)
    request = Request(hashes("ab"))
    prefixes.add(request)
    prefixes.remove(request)
    prefixes.remove(request)
    publish(kv, prefixes, "ab")
    assert request.told == []


def test_without_evictions_it_always_knows_what_a_match_would_find() -> None:
    rng = random.Random(5)
    kv = KVCache(4096)
    prefixes = followed(kv)
    queued: dict[Request, int] = {}
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 9)))
        action = rng.random()
        if action < 0.4:
            request = Request(hashes(text))
            queued[request] = prefixes.add(request)
        elif action < 0.6 and queued:
            request = rng.choice(list(queued))
            prefixes.remove(request)
            del queued[request]
        else:
            publish(kv, prefixes, text)
        for request, at_first in queued.items():
            assert [at_first, *request.told][-1] == len(kv.match(request.reusable_hashes))
    for request in queued:
        prefixes.remove(request)
    assert not prefixes._lacking
    assert not prefixes._num_matched
