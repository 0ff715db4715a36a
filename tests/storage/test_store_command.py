"""``kvrelay store``: what an operator sees of a store from outside, and that looking changes nothing."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from mooncake_master import MooncakeMaster
from storage_rooms import planes, views
from support.cluster_config import cluster_config, d, fake_engine, p
from support.redis_server import RedisServer, redis_server

from kvrelay.cluster.cli import main
from kvrelay.config.cluster_config import ClusterConfig, NodeConfig
from kvrelay.engine.fake import fake_geometry
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.machine.clock import Clock
from kvrelay.protocol.block_hash import BlockHasher
from kvstore.storage.factory import make_store

CAPACITY = 1 << 20
PASSWORD = "correct-horse"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Store = Callable[..., Outcome]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Store:
    """Run ``kvrelay store ...``; unless there is an ``answer``, nobody answers what it asks."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object, answer: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        monkeypatch.setattr(sys, "argv", ["kvrelay", "store", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, *capsys.readouterr())

    return run


def written(tmp_path: Path, *nodes: dict[str, Any], **storage: Any) -> Path:
    """Return the config file of a cluster with fake engines."""
    path = tmp_path / "cluster.yaml"
    storage = {"timeout_s": 60.0, **storage}  # on a busy machine things take long
    config = cluster_config(tmp_path, *(nodes or (p(), d())), storage=storage, engine=fake_engine())
    path.write_text(yaml.safe_dump(config))
    return path


def file_store(tmp_path: Path) -> dict[str, Any]:
    return {"backend": "file", "path": str(tmp_path / "kv"), "capacity": CAPACITY}


def fill(config: Path, count: int, *overrides: str) -> None:
    """Put ``count`` blocks into the store, as the node d0 would."""
    node = ClusterConfig.load(config, overrides).node("d0")
    asyncio.run(_fill(node, count))


async def _fill(node: NodeConfig, count: int) -> None:
    geometry = fake_geometry(node.engine.fake, node.cache.block_size)
    hashes = BlockHasher(geometry.model_digest, 1).hashes(list(range(count)))
    store = make_store(node.storage, geometry, Clock())
    await store.open()
    try:
        assert {str(outcome) for outcome in await store.put(hashes, views(planes(count, geometry=geometry)))} == {
            "written"
        }
    finally:
        await store.close()


def numbers(outcome: Outcome) -> list[str]:
    """Return backend, blocks and tokens of what ``stats`` has shown."""
    assert outcome.code == 0, outcome.err
    title, row = outcome.out.splitlines()
    assert title.split()[:3] == ["backend", "blocks", "tokens"]
    return row.split()[:3]


def files(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*")}


# ---------------------------------------------------------------- file


def test_a_store_that_nobody_made_is_empty_and_stays_unmade(store: Store, tmp_path: Path) -> None:
    config = written(tmp_path, **file_store(tmp_path))
    assert numbers(store("stats", config)) == ["file", "0", "0"]
    assert store("verify", config) == (0, "0 blocks read, none corrupt\n", "")
    assert store("clear", config, "--yes") == (0, "0 blocks deleted\n", "")
    assert not (tmp_path / "kv").exists()


def test_stats_of_what_nodes_have_stored(store: Store, tmp_path: Path) -> None:
    config = written(tmp_path, **file_store(tmp_path))
    fill(config, 5)
    assert numbers(store("stats", config)) == ["file", "5", "80"]


def test_looking_changes_no_file_whatever_the_config_says_now(store: Store, tmp_path: Path) -> None:
    """Opened by a node, a store of another capacity would be laid out anew, and that of another model removed."""
    config = written(tmp_path, **file_store(tmp_path))
    fill(config, 5)
    before = files(tmp_path / "kv")
    assert numbers(store("stats", config, "--set", f"storage.capacity={2 * CAPACITY}")) == ["file", "5", "80"]
    assert numbers(store("stats", config, "--set", "engine.fake.vocab_size=77")) == ["file", "0", "0"]
    assert store("verify", config).code == 0
    assert files(tmp_path / "kv") == before


def test_a_corrupt_block_is_found_and_dropped(store: Store, tmp_path: Path) -> None:
    config = written(tmp_path, **file_store(tmp_path))
    fill(config, 5)
    assert store("verify", config) == (0, "5 blocks read, none corrupt\n", "")
    [slab] = (tmp_path / "kv").rglob("slab-*")
    content = bytearray(slab.read_bytes())
    at = next(index for index, byte in enumerate(content) if byte)
    content[at] ^= 0xFF
    slab.write_bytes(content)
    assert store("verify", config) == (1, "5 blocks read, 1 corrupt and deleted\n", "")
    assert store("verify", config) == (0, "4 blocks read, none corrupt\n", "")


def test_clear_asks_first(store: Store, tmp_path: Path) -> None:
    config = written(tmp_path, **file_store(tmp_path))
    fill(config, 5)
    for answer in ("", "n\n"):
        outcome = store("clear", config, answer=answer)
        assert outcome.code == 1
        assert "from the file store?" in outcome.out
    assert numbers(store("stats", config))[1] == "5"
    assert store("clear", config, answer="y\n").code == 0
    assert numbers(store("stats", config))[1] == "0"


def test_clear_leaves_other_models_alone(store: Store, tmp_path: Path) -> None:
    config, other = written(tmp_path, **file_store(tmp_path)), "engine.fake.vocab_size=77"
    fill(config, 5)
    assert store("clear", config, "--yes", "--set", other).out == "0 blocks deleted\n"
    assert numbers(store("stats", config))[1] == "5"


def test_a_store_that_may_not_be_read_is_an_error_with_words(store: Store, tmp_path: Path) -> None:
    config = written(tmp_path, **file_store(tmp_path))
    (tmp_path / "kv").write_text("a file")
    code, _, err = store("stats", config)
    assert code == 1
    assert err.startswith("error: cannot use the KV in")


# ---------------------------------------------------------------- whose store


@pytest.mark.parametrize("backend", ["none", "memory"])
@pytest.mark.parametrize("verb", ["stats", "clear", "verify"])
def test_what_cannot_be_seen_from_outside_is_a_usage_error(
    store: Store, tmp_path: Path, backend: str, verb: str
) -> None:
    code, out, err = store(verb, written(tmp_path, backend=backend))
    assert (code, out) == (2, "")
    assert err.startswith(f"storage.backend: {backend}: ")


def test_where_nodes_have_stores_of_their_own_one_must_be_named(store: Store, tmp_path: Path) -> None:
    apart = d(storage={"path": str(tmp_path / "elsewhere")})
    config = written(tmp_path, p(), apart, **file_store(tmp_path))
    fill(config, 5)
    code, _, err = store("stats", config)
    assert code == 2
    assert "--node (p0, d0)" in err
    assert numbers(store("stats", config, "--node", "d0"))[1] == "5"
    assert numbers(store("stats", config, "--node", "p0"))[1] == "0"
    assert store("stats", config, "--node", "x9").code == 2


@pytest.mark.parametrize("arguments", [[], ["stats"], ["clear", "missing.yaml"], ["drop", "c.yaml"]])
def test_bad_usage_exits_2(store: Store, arguments: list[str]) -> None:
    assert store(*arguments).code == 2


# ---------------------------------------------------------------- Redis, Mooncake


def test_redis_with_a_password_is_seen_and_when_it_is_gone_said_so(
    store: Store, tmp_path: Path, redis_one: RedisServer | None
) -> None:
    if redis_one is None:
        pytest.skip("no redis-server on this machine")
    with redis_server("--requirepass", PASSWORD) as server:
        url = f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0"
        config = written(tmp_path, backend="redis", url=url)
        fill(config, 5)
        assert numbers(store("stats", config)) == ["redis", "5", "80"]
        assert store("verify", config).out == "5 blocks read, none corrupt\n"
        assert store("clear", config, "--yes").out == "5 blocks deleted\n"
        server.kill()
        outcome = store("stats", config)
    assert outcome.code == 1
    assert outcome.err.startswith("error: Redis at redis://127.0.0.1:")
    assert PASSWORD not in outcome.err + outcome.out


def test_an_operator_does_not_pass_for_an_owner(store: Store, tmp_path: Path, redis_one: RedisServer | None) -> None:
    """With ``payload: owner``, other hosts would ask this process for blocks."""
    if redis_one is None:
        pytest.skip("no redis-server on this machine")
    with redis_one.client() as client:
        client.flushall()
        path = str(tmp_path / "kv")
        config = written(tmp_path, backend="redis", url=redis_one.url, payload="owner", path=path, capacity=CAPACITY)
        assert numbers(store("stats", config))[1] == "0"
        assert not (tmp_path / "kv").exists()
        assert client.keys("*") == []
        fill(config, 5)
        [owner] = client.keys("kvrelay:owner:*")
        address = client.get(owner)
        assert numbers(store("stats", config)) == ["redis", "5", "80"]
        assert store("verify", config).out == "5 blocks read, none corrupt\n"
        assert client.get(owner) in (address, None)
        assert store("clear", config, "--yes").out == "5 blocks deleted\n"
        assert client.keys("kvrelay:at:*") == []


def test_mooncake_tells_what_it_can(tmp_path: Path, mooncake: MooncakeMaster | str) -> None:
    """In a process of its own, as the library keeps some things for the life of one."""
    if isinstance(mooncake, str):
        pytest.skip(mooncake)
    config = written(tmp_path, backend="mooncake", master=mooncake.address, capacity=CAPACITY << 4)

    def run(*arguments: str) -> Outcome:
        command = [sys.executable, "-m", "kvrelay.cluster", "store", *arguments]
        environment = {**os.environ, "GLOG_minloglevel": "3", "COLUMNS": "200", "NO_COLOR": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return Outcome(done.returncode, done.stdout, done.stderr)

    assert numbers(run("stats", str(config))) == ["mooncake", "-", "-"]
    verified = run("verify", str(config))
    assert verified.code == 1
    assert "error: mooncake cannot list its objects" in verified.err
    assert run("clear", str(config), "--yes").out == "0 blocks deleted\n"


# ---------------------------------------------------------------- a real model


def test_a_checkpoint_is_read_without_paddle(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model", "qwen2", 0)
    config = cluster_config(tmp_path / "model", p(), d(), storage=file_store(tmp_path), engine={"kernels": "portable"})
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
    script = (
        "import sys; from kvrelay.cluster.cli import app; sys.argv[1:] = ['store', 'stats', sys.argv[1]];"
        "app(standalone_mode=False); sys.exit('paddle' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cluster.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "float32" in done.stdout
