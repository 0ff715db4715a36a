"""What a good config turns into: defaults, each node's own keys, overrides, environment, paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from kvrelay.config.base import Section
from kvrelay.config.cluster_config import ClusterConfig, NodeConfig, Role
from kvrelay.errors import ConfigError

FROM_THE_DESIGN = """\
model: {path: models/demo, served_name: demo, dtype: auto, max_model_len: 4096}
router: {host: 127.0.0.1, port: 8000, control: "tcp://127.0.0.1:8100",
         prefill_routing: least_loaded, decode_routing: least_loaded, max_queued_requests: 512}
cache: {block_size: 16, num_blocks: 4096, dtype: auto, prefix_caching: true}
scheduler: {max_num_batched_tokens: 2048, max_num_seqs: 64, reserve_policy: new_token_ratio,
            preemption_order: latest_first}
transfer: {link: auto, layerwise: true, checksum: true, lease_s: 30}
storage: {backend: none}
nodes:
  - {name: p0, role: prefill, host: 127.0.0.1, port: 8200, threads: 1, cpus: [0]}
  - {name: d0, role: decode,  host: 127.0.0.1, port: 8300, cache: {num_blocks: 2048}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(FROM_THE_DESIGN)
    return path


def test_the_design_s_example(path: Path) -> None:
    config = ClusterConfig.load(path, env={})

    p0, d0 = config.node("p0"), config.node("d0")
    assert (p0.role, p0.address, p0.cpus) == (Role.PREFILL, "tcp://127.0.0.1:8200", (0,))
    assert (p0.cache.num_blocks, d0.cache.num_blocks) == (4096, 2048)
    assert d0.scheduler == config.scheduler
    assert (config.model.name, config.router.url) == ("demo", "http://127.0.0.1:8000")


def test_a_node_keeps_the_cluster_s_keys_beside_its_own() -> None:
    config = ClusterConfig.from_data(
        {
            "scheduler": {"max_num_seqs": 7, "new_token_ratio": {"init": 0.5}},
            "nodes": [{"name": "m0", "role": "mixed", "port": 1, "scheduler": {"new_token_ratio": {"min": 0.2}}}],
        }
    )

    scheduler = config.node("m0").scheduler
    assert (scheduler.max_num_seqs, scheduler.new_token_ratio.init, scheduler.new_token_ratio.min) == (7, 0.5, 0.2)
    assert config.scheduler.new_token_ratio.min == 0.1


def test_earlier_names_of_keys_are_accepted_with_a_warning_each(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(FROM_THE_DESIGN.replace("_routing", "_policy").replace("least_loaded", "round_robin"))
    config = ClusterConfig.load(path, ["nodes.d0.router.decode_policy=least_loaded"], env={})

    assert (config.router.prefill_routing, config.router.decode_routing) == ("round_robin", "round_robin")
    assert config.node("d0").router.decode_routing == "least_loaded"
    assert config.warnings == (
        f"{path}:3: router.prefill_policy: is deprecated, use prefill_routing",
        f"{path}:3: router.decode_policy: is deprecated, use decode_routing",
        "--set nodes.d0.router.decode_policy=least_loaded: nodes.d0.router.decode_policy: is deprecated, use "
        "decode_routing",
    )
    assert ClusterConfig.from_data({"nodes": [{"name": "m0", "role": "mixed", "port": 1}]}).warnings == ()


def test_overrides_go_before_the_environment_before_the_file(path: Path) -> None:
    env = {"KVRELAY_ROUTER__PORT": "9001", "KVRELAY_CACHE__PREFIX_CACHING": "false", "KVRELAY_NODES__D0__PORT": "9002"}

    config = ClusterConfig.load(path, ["router.port=9000", "nodes.d0.cache.num_blocks=64", "nodes.0.cpus=[1, 2]"], env)

    assert config.router.port == 9000
    assert config.cache.prefix_caching is False
    assert (config.node("d0").port, config.node("d0").cache.num_blocks) == (9002, 64)
    assert config.node("p0").cpus == (1, 2)


def test_an_override_of_a_shared_section_does_not_touch_a_node_s_own_key(path: Path) -> None:
    config = ClusterConfig.load(path, ["cache.num_blocks=128"], {})

    assert (config.node("p0").cache.num_blocks, config.node("d0").cache.num_blocks) == (128, 2048)


def test_variables_that_are_no_keys_are_left_alone(path: Path) -> None:
    assert ClusterConfig.load(path, env={"KVRELAY_RUNTIME_DIR": "/x", "ROUTER__PORT": "1"}).router.port == 8000


def test_an_alias_is_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "nodes:\n"
        "  - {name: m0, role: mixed, port: 1, cache: &small {num_blocks: 64}}\n"
        "  - {name: m1, role: mixed, port: 2, cache: *small}\n"
    )

    config = ClusterConfig.load(path, ["nodes.m1.cache.num_blocks=32"], {})

    assert [node.cache.num_blocks for node in config.nodes] == [64, 32]


def test_model_paths_are_found_from_here_then_from_the_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "models/demo").mkdir(parents=True)
    assert ClusterConfig.load(path, env={}).node("p0").model.path == str(tmp_path / "models/demo")

    (elsewhere / "models/demo").mkdir(parents=True)
    assert ClusterConfig.load(path, env={}).node("p0").model.path == str(elsewhere / "models/demo")


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("100000", 100000), ("1MB", 10**6)]
)
def test_sizes(path: Path, text: str, size: int) -> None:
    assert ClusterConfig.load(path, [f"transfer.max_inflight_bytes={text}"], {}).transfer.max_inflight_bytes == size


def test_the_config_cannot_be_changed(path: Path) -> None:
    config = ClusterConfig.load(path, env={})

    with pytest.raises(ValidationError):
        config.router.port = 1  # type: ignore[misc]


def test_an_unknown_node_is_named_with_those_there_are(path: Path) -> None:
    with pytest.raises(ConfigError, match="no node is called 'd7'; there are p0, d0"):
        ClusterConfig.load(path, env={}).node("d7")


@pytest.mark.parametrize("name", ["1p1d", "1p3d", "mixed"])
def test_the_shipped_configs_load(name: str) -> None:
    configs = Path(__file__).parents[3] / "configs"

    assert ClusterConfig.load(configs / f"{name}.yaml", env={}).nodes


def test_every_key_is_described_and_every_number_bounded() -> None:
    sections: list[type[Section]] = [NodeConfig, *Section.__subclasses__()]
    for section in sections:
        for name, key in section.model_json_schema(mode="serialization")["properties"].items():
            assert "$ref" in key or key.get("description"), f"{section.__name__}.{name}"
            for branch in key.get("anyOf", [key]):
                if branch.get("type") in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & branch.keys(), f"{section.__name__}.{name}"
                    assert {"maximum", "exclusiveMaximum"} & branch.keys(), f"{section.__name__}.{name}"
