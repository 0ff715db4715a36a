"""Everything that a machine does follows from its events: recorded in a World, it does the same again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
from support.world import World

from kvrelay.cluster.recorded_machine import codec_of, machine_of
from kvrelay.cluster.replay import Difference, first_difference, replay
from kvrelay.errors import ConfigError
from kvrelay.protocol.ids import NodeId, RequestId, peer_name
from kvrelay.recording.recording_file import opened, write
from router.events import ClientGone, DumpRequested
from router.requests import Requests

CHOOSES_PLANS_IN_FLIGHT = True

SHAPES: dict[str, Callable[[int], World]] = {
    "disaggregated": lambda seed: World(seed, prefill=2, decode=2, record=True),
    "crowded": lambda seed: World(
        seed,
        decode=2,
        cache={"num_blocks": 16},
        scheduler={"max_num_seqs": 4, "max_num_batched_tokens": 16},
        storage={"backend": "file", "min_read_tokens": 1},
        record=True,
    ),
    "mixed with drafts": lambda seed: World(
        seed,
        prefill=0,
        decode=0,
        mixed=2,
        engine={"max_plans_in_flight": 2},
        speculative={"method": "ngram"},
        record=True,
    ),
    "prefixes": lambda seed: World(
        seed,
        prefill=2,
        mixed=1,
        router={"prefill_routing": "cache_aware", "decode_routing": "power_of_two", "local_prefill_tokens": 8},
        nodes={"d0": {"kv_events": {"endpoint": "tcp://127.0.0.1:5557"}}},
        record=True,
    ),
    "predicted times": lambda seed: World(
        seed,
        prefill=2,
        decode=2,
        mixed=1,
        router={"prefill_routing": "ttft", "decode_routing": "ttft", "local_prefill_tokens": 8},
        limits={"ttft_slo_s": 0.05},
        record=True,
    ),
}


def live(world: World, rng: random.Random) -> None:
    """Have ``world`` serve requests over a bad network, while clients leave and a node dies."""
    world.link.disturb(drop=0.01, delay=0.03, duplicate=0.02, overtake=0.01)
    shared = world.prompt(24)
    for number in range(16):
        prompt = [*shared[: rng.randrange(24)], *world.prompt(rng.randint(1, 12))]
        client = world.submit(prompt, rng.randint(1, 12), num_logprobs=rng.choice([None, 2]), priority=number % 2)
        world.run_for(rng.random() * 0.02)
        if rng.random() < 0.2:
            world.abort(client)
    world.restart(rng.choice(sorted(world.nodes)))
    world.run_for(0.2)
    world.link.heal()
    world.run_until(world.all_ended)


def files(world: World, directory: Path) -> Iterator[Path]:
    """Write the recordings of all processes of ``world``, each to a directory of its own: several have one name."""
    assert world.recorders
    for number, recorder in enumerate(world.recorders):
        yield write(recorder.recording(), directory / str(number), prompts=True)


def difference_in(path: Path) -> Difference | None:
    with opened(path) as (header, records):
        return first_difference(machine_of(header.role, header.start), codec_of(header.role), records)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_every_machine_does_the_same_again(shape: str, seed: int, tmp_path: Path) -> None:
    with SHAPES[shape](seed) as world:
        live(world, random.Random(seed))
    for path in files(world, tmp_path):
        assert difference_in(path) is None, path


def test_nothing_depends_on_the_order_of_sets(tmp_path: Path) -> None:
    """Texts hash differently in each process, unless it is told not to."""
    for shape in ("crowded", "prefixes"):
        with SHAPES[shape](7) as world:
            live(world, random.Random(7))
        assert all(files(world, tmp_path / shape))
    program = (
        "import sys, pathlib; from kvrelay.cluster.replay import replay\n"
        "sys.exit(sum(not replay(path, print) for path in sorted(pathlib.Path(sys.argv[1]).glob('*/*/*.kvrec'))))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.count("the same actions") >= 12


def test_a_machine_that_does_something_else_is_found_with_the_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with World(record=True) as world:
        client = world.submit(30, 8)
        world.run_until_arrived("TokensOut")
        world.abort(client)
        world.run_until(world.all_ended)
    path = next(files(world, tmp_path))
    monkeypatch.setattr(Requests, "abort", lambda self, request_id: None)

    found = difference_in(path)

    assert found is not None
    with opened(path) as (header, records):
        event = codec_of(header.role).decode(list(records)[found.number].event).event
    assert event == ClientGone(RequestId(client.request_id))
    assert any("Abort" in text for text in found.recorded)
    assert found.replayed == ["nothing more"]
    said: list[str] = []
    assert not replay(path, said.append)
    assert f"#{found.number} " in said[-4 if len(found.recorded) == 1 else -3 - len(found.recorded)]
    assert any(line.startswith("  - recorded: ") and "Abort" in line for line in said)


def test_no_token_is_in_files_without_prompts(tmp_path: Path) -> None:
    with World(engine={"vocab_size": 30_000}, record=True) as world:
        client = world.submit([20_001 + 7 * number for number in range(30)], 6, num_logprobs=2, num_prompt_logprobs=1)
        world.run_until(world.all_ended)
    tokens = {token for token in (*client.prompt, *client.token_ids) if token > 20_000}
    assert len(tokens) > 30
    assert world.recorders
    found = set()
    for recorder in world.recorders:
        found |= tokens_in(write(recorder.recording(), tmp_path, prompts=True), tokens)
        public = write(recorder.recording(), tmp_path, prompts=False)
        assert tokens_in(public, tokens) == set()
        with pytest.raises(ConfigError, match="prompts were left out"):
            replay(public, print)
    assert found == tokens


def tokens_in(path: Path, tokens: set[int]) -> set[int]:
    """Return which of ``tokens`` are in a file: as numbers, in arrays, or in messages as they came."""
    with opened(path) as (header, records):
        values = [*leaves(header.start), *leaves([[*record] for record in records])]
    arrays = [value for value in values if isinstance(value, bytes)]
    numbers = {value for value in values if isinstance(value, int)}

    def is_there(token: int) -> bool:
        forms = token.to_bytes(4, "little"), msgpack.packb(token)
        return token in numbers or any(form in array for form in forms for array in arrays)

    return {token for token in tokens if is_there(token)}


def leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_a_router_gets_the_files_of_a_node_and_its_messager() -> None:
    with World() as world:
        world.router.handle(DumpRequested(NodeId("d0"), "0a1b", with_prompts=False))
        world.run_until(lambda: len(world.dumps) == 2)
    assert {(dump.process, dump.path) for dump in world.dumps} == {
        ("d0", "/d0.kvrec"),
        ("d0.messager", "/d0.messager.kvrec"),
    }


def test_world_records_every_process() -> None:
    with World(decode=2, record=True) as world:
        pass
    assert world.recorders
    names = sorted(recorder.recording().process for recorder in world.recorders)
    assert names == ["d0", "d0.messager", "d1", "d1.messager", "p0", "p0.messager", "router"]
    assert {peer_name(process.peer) for process in world.dead} <= set(names)
