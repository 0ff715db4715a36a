"""Every kind of link, every chunk boundary: blocks must come out on D as P has written them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.asking import Ask, answers, assert_right, random_prompt
from support.cluster import running
from support.cluster_config import cluster_config, d, fake_engine, p

from kvrelay.engine.fake import fake_geometry

TOKEN_BUDGETS = {"shm": 16, "ipc": 24, "tcp": 2048}
DEVICE_TOKEN_BUDGETS = {"cuda": 16, "ipc": 24, "tcp": 2048}


@pytest.mark.parametrize(("block_size", "device_pool"), [(4, False), (16, False), (16, True)])
def test_links_and_chunk_boundaries(model: Path, block_size: int, device_pool: bool) -> None:
    """Three prefill nodes, each with a link and a token budget of its own, take turns.

    Steps take no time, so layer 0 is signalled while D is still being asked for blocks.
    """
    budgets = DEVICE_TOKEN_BUDGETS if device_pool else TOKEN_BUDGETS
    config = cluster_config(
        model,
        *(
            p(f"p{index}", transfer={"link": link}, scheduler={"max_num_batched_tokens": budget})
            for index, (link, budget) in enumerate(budgets.items())
        ),
        d(),
        cache={"block_size": block_size, "num_blocks": 2048},
        router={"prefill_routing": "round_robin"},
        engine=fake_engine(device_pool=device_pool),
    )
    rng = random.Random(block_size)
    lengths = [1, 2, 3, 4, 5, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 100, 200, 300]
    asks = [Ask(random_prompt(rng, length), 8) for length in lengths for _ in budgets]

    with running(config) as cluster:
        given = answers(cluster, asks, limit=12)
        cluster.wait_until_quiescent()

        assert assert_right(cluster, asks, given) == len(asks)
        shape = fake_geometry(cluster.fake(), block_size)
        counters = {name: load["counters"] for name, load in cluster.loads().items()}
        assert [counters[f"p{index}"][f"links_{link}"] for index, link in enumerate(budgets)] == [1, 1, 1]
        assert all(counters[f"p{index}"]["pending_signals_total"] > 0 for index in range(3))
        moved_blocks = sum(shape.blocks_for(len(ask.prompt)) for ask in asks)
        hit_blocks = counters["d0"]["prefix_hit_tokens"] // block_size
        assert counters["d0"]["kv_bytes_received"] == (moved_blocks - hit_blocks) * shape.block_bytes
        assert counters["d0"]["bytes_written"] == counters["d0"]["kv_bytes_received"]
        assert cluster.metrics()["kvrelay_node_pending_signals_total"] > 0
