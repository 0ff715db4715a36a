"""Whatever way a request takes, its tokens are those of a clean run, and only the KV it needs moves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.world import EOS, Client, World

from kvrelay.protocol.messages.messager_to_messager import KVFrame
from kvrelay.protocol.request import FinishReason

BLOCK_SIZES = [1, 4, 16]
LAYERS = [1, 3]


def lengths(block_size: int) -> list[int]:
    """Prompt lengths around every edge of a block, and one of many blocks."""
    return sorted({1, 2, *(max(1, k * block_size + d) for k in (1, 2, 3) for d in (-1, 0, 1)), 70})


def budgets(block_size: int) -> list[int]:
    return sorted({max(1, block_size - 1), block_size + 1, 3 * block_size, 64})


MATRIX = [(size, budget, layers) for size in BLOCK_SIZES for budget in budgets(size) for layers in LAYERS]


def cluster(block_size: int, budget: int, layers: int, **options: Any) -> World:
    return World(
        prefill=1,
        cache={"block_size": block_size, "num_blocks": 1200 // block_size, **options.pop("cache", {})},
        scheduler={"max_num_batched_tokens": budget},
        engine={"num_layers": layers, "eos_every": 0},
        **options,
    )


def kv_bytes(world: World, clients: list[Client]) -> int:
    """What must move if nothing is in any prefix cache."""
    geometry = world.nodes["p0"].engine.geometry
    return sum(geometry.blocks_for(len(client.prompt)) * geometry.block_bytes for client in clients)


@pytest.mark.parametrize(("block_size", "budget", "layers"), MATRIX)
def test_chunk_boundaries(block_size: int, budget: int, layers: int) -> None:
    with cluster(block_size, budget, layers) as world:
        clients = [world.submit(length, 5) for length in lengths(block_size)]
    assert world.counted("kv_bytes_received", "d") == kv_bytes(world, clients) == world.counted("kv_bytes_sent", "p")


@pytest.mark.fault("F24")
@pytest.mark.parametrize(("block_size", "budget", "layers"), MATRIX)
def test_layer_signals_come_before_the_reservation(block_size: int, budget: int, layers: int) -> None:
    """FastDeploy's layer-0 race: the messager keeps what is signalled too early, in order, and loses nothing."""
    with cluster(block_size, budget, layers) as world:
        world.link.delay("BlocksReserved", 0.02)
        clients = [world.submit(length, 5) for length in lengths(block_size)]
        world.run_until(world.all_ended)
        world.run_for(1.5)  # until the messager's counters have been reported
    assert world.counted("pending_signals_total", "p") > 0
    assert world.counted("kv_bytes_received", "d") == kv_bytes(world, clients)


@pytest.mark.parametrize(("layerwise", "layers_at_once"), [(True, 1), (True, 2), (False, 1)])
@pytest.mark.parametrize("link", ["auto", "shm", "zmq", "ipc", "tcp"])
@pytest.mark.parametrize("device_pool", [False, True])
def test_every_link(link: str, layerwise: bool, layers_at_once: int, device_pool: bool) -> None:
    link = "cuda" if device_pool and link == "shm" else link
    transfer = {"link": link, "layerwise": layerwise}
    engine = {"device_pool": device_pool, "num_layers": 3}
    with World(decode=2, transfer=transfer, engine=engine, layers_at_once=layers_at_once) as world:
        for length in (1, 4, 33, 50):
            world.submit(length, 9)
    shared_memory = link in ("auto", "shm", "cuda")
    assert (world.link.payload_bytes == 0) is shared_memory


@pytest.mark.parametrize("on_device", ["p0", "d0"])
def test_pools_of_different_memory_exchange_payload(on_device: str) -> None:
    with World(nodes={on_device: {"engine": {"device_pool": True}}}) as world:
        world.submit(33, 9)
    assert world.link.payload_bytes > 0


def test_hosts_apart_use_tcp_whatever_is_quicker_at_home() -> None:
    with World(nodes={"d0": {"host": "10.0.0.2"}}) as world:
        world.submit(33, 9)
    assert world.link.payload_bytes > 0


def test_checksums_may_be_off() -> None:
    with World(transfer={"checksum": False, "link": "tcp"}) as world:
        world.submit(33, 9)
        world.serve_all()
        messages = [getattr(event, "message", None) for _, _, event in world.history]
        frames = [message for message in messages if isinstance(message, KVFrame)]
        assert frames and all(frame.digest == 0 for frame in frames)


@pytest.mark.fault("F12")
@pytest.mark.parametrize("max_inflight_bytes", [1 << 16, 1 << 20])
def test_many_long_prompts_share_a_small_credit(max_inflight_bytes: int) -> None:
    """40 prompts of 8 blocks of 4 KiB per layer through a credit of 16 blocks: all get there, none is passed over."""
    with World(
        prefill=2,
        cache={"block_size": 16, "num_blocks": 400},
        engine={"num_kv_heads": 8, "head_dim": 16, "num_layers": 2},
        scheduler={"max_num_seqs": 64},
        transfer={"max_inflight_bytes": max_inflight_bytes, "link": "tcp"},
    ) as world:
        for _ in range(40):
            world.submit(128, 3)
        world.serve_all()


@pytest.mark.fault("F17")
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_mixed_node_gives_the_same_tokens(block_size: int) -> None:
    for budget in budgets(block_size):
        cache = {"block_size": block_size, "num_blocks": 1200 // block_size}
        with World(prefill=0, decode=0, mixed=1, cache=cache, scheduler={"max_num_batched_tokens": budget}) as world:
            for length in lengths(block_size):
                world.submit(length, 5)
            world.serve_all()


STYLES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    {"num_logprobs": 3},
    {"logit_bias": {7: 5.0, 9: -100.0}, "temperature": 1.0, "num_logprobs": 0},
]


@pytest.mark.fault("F17")
def test_sampling_penalties_and_logprobs_go_on_behind_the_hand_off() -> None:
    logprobs = []
    shapes: list[dict[str, Any]] = [{"prefill": 1, "decode": 1}, {"prefill": 0, "decode": 0, "mixed": 1}]
    for roles in shapes:
        with World(**roles) as world:
            clients = [world.submit(length, 12, **style) for length, style in itertools.product((3, 16, 30), STYLES)]
        for client in clients:
            wanted = client.sampling.num_logprobs is not None
            assert len(client.logprobs) == (len(client.token_ids) if wanted else 0)
        logprobs.append([client.logprobs for client in clients])
    assert logprobs[0] == logprobs[1]


def first_token_is_eos(world: World) -> list[int]:
    return next(prompt for prompt in iter(lambda: world.prompt(9), None) if world.greedy_reference(prompt)[0] == EOS)


@pytest.mark.fault("F17")
def test_a_request_for_one_token_needs_no_decode_node() -> None:
    with World() as world:
        client = world.submit(30, 1)
    assert client.finish_reason is FinishReason.LENGTH
    assert len(client.token_ids) == 1
    assert world.link.sent["ReserveBlocks"] == 0


@pytest.mark.fault("F17")
def test_a_first_token_that_ends_the_request_gives_the_reservation_back() -> None:
    with World(engine={"eos_every": 4}) as world:
        client = world.submit(first_token_is_eos(world), 20)
    assert client.finish_reason is FinishReason.STOP
    assert client.token_ids == [EOS]
    assert world.link.sent["ReserveBlocks"] == 1
    assert world.link.sent["HandOff"] == 0


@pytest.mark.fault("F17")
def test_a_first_token_that_ends_nothing_if_eos_is_to_be_ignored() -> None:
    with World(engine={"eos_every": 4}) as world:
        client = world.submit(first_token_is_eos(world), 20, ignore_eos=True)
    assert client.finish_reason is FinishReason.LENGTH
    assert len(client.token_ids) == 20


def test_min_tokens_holds_across_the_hand_off() -> None:
    with World(engine={"eos_every": 2}) as world:
        clients = [world.submit(9, 20, min_tokens=5) for _ in range(8)]
    assert all(len(client.token_ids) > 5 for client in clients)
    assert any(client.finish_reason is FinishReason.STOP for client in clients)


@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_stop_token_ends_the_request_where_it_comes(place: int) -> None:
    with World(engine={"eos_every": 0}) as world:
        prompt = world.prompt(10)
        stop = world.greedy_reference(prompt)[place]
        client = world.submit(prompt, 20, stop_token_ids=[stop])
    assert len(client.token_ids) == place + 1
    assert client.finish_reason is FinishReason.STOP
    assert client.stop_token_id == stop


# ---------------------------------------------------------------- prefix caches


def served(world: World, prompt: list[int], max_tokens: int = 6) -> tuple[Client, float]:
    """Serve one request; return it and the KV bytes that moved for it."""
    before = world.counted("kv_bytes_received", "d")
    client = world.submit(prompt, max_tokens)
    world.settle()
    return client, world.counted("kv_bytes_received", "d") - before


@pytest.mark.parametrize("length", [3, 4, 15, 16, 17, 33])
def test_the_same_prompt_again_moves_only_what_is_no_full_block(length: int) -> None:
    with World(engine={"eos_every": 0}) as world:
        block_bytes = world.nodes["p0"].engine.geometry.block_bytes
        prompt = world.prompt(length)
        _, moved = served(world, prompt)
        assert moved == -(-length // 4) * block_bytes
        again, moved = served(world, prompt)
        assert moved == (length % 4 > 0) * block_bytes
        assert again.num_cached_tokens == length // 4 * 4
        assert world.counted("prefix_hit_tokens", "d") == length // 4 * 4


@pytest.mark.fault("F17")
def test_a_whole_prompt_hit_on_both_nodes_computes_one_token_and_moves_nothing() -> None:
    with World(engine={"eos_every": 0}) as world:
        prompt = world.prompt(32)
        served(world, prompt)
        before = world.counted("prefill_tokens", "p")
        _, moved = served(world, prompt)
        assert moved == 0
        assert world.counted("prefill_tokens", "p") - before == 1


def test_a_common_beginning_moves_once() -> None:
    with World(engine={"eos_every": 0}) as world:
        block_bytes = world.nodes["p0"].engine.geometry.block_bytes
        common = world.prompt(20)
        served(world, common + world.prompt(10))
        _, moved = served(world, common + world.prompt(10))
        assert moved == 3 * block_bytes


def test_prompts_that_arrive_together_share_a_beginning_without_harm() -> None:
    for seed in range(5):
        with World(seed, decode=2, engine={"eos_every": 0}) as world:
            common = world.prompt(21)
            for _ in range(6):
                world.submit(common + world.prompt(world.rng.randrange(0, 9)), 10)
            world.serve_all()
            assert any(client.num_cached_tokens for client in world.clients.values())


@pytest.mark.parametrize("output_caching", [True, False])
def test_the_next_turn_of_a_chat_finds_the_answer_on_the_decode_node(output_caching: bool) -> None:
    with World(engine={"eos_every": 0}, cache={"output_caching": output_caching}) as world:
        block_bytes = world.nodes["p0"].engine.geometry.block_bytes
        first, _ = served(world, world.prompt(16), 13)
        prompt = [*first.prompt, *first.token_ids, *world.prompt(3)]
        _, moved = served(world, prompt)
        # 32 tokens; of the first turn's 29 all but the newest have KV on D: 7 blocks of the 8.
        assert moved == (1 if output_caching else 4) * block_bytes


def test_without_prefix_caching_everything_moves_again() -> None:
    with World(engine={"eos_every": 0}, cache={"prefix_caching": False}) as world:
        prompt = world.prompt(20)
        _, first = served(world, prompt)
        client, second = served(world, prompt)
        assert first == second > 0
        assert client.num_cached_tokens == 0


def test_prefix_hits_survive_eviction_pressure() -> None:
    """A small pool where every request evicts what others left: tokens stay right."""
    with World(cache={"num_blocks": 20}) as world:
        prompts = [world.prompt(40) for _ in range(3)]
        for index in (0, 1, 0, 2, 1, 0, 0, 2):
            served(world, prompts[index])
        assert world.counted("evicted_blocks", "d") > 0
        assert world.counted("evicted_blocks", "p") > 0
