"""Keys that were renamed: the old name counts, with a warning; both together are an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.config.renamed import RENAMED
from kvrelay.errors import ConfigError

NODES = "nodes:\n  - {name: m0, role: mixed, port: 8300}\n"


def load(tmp_path: Path, text: str, *overrides: str, env: dict[str, str] | None = None) -> ClusterConfig:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return ClusterConfig.load(path, overrides, env or {})


def test_an_old_key_in_the_file_counts_and_is_told_with_its_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(tmp_path, NODES + "router: {prefill_policy: round_robin}\n")

    assert config.router.prefill_routing == "round_robin"
    assert config.node("m0").router.prefill_routing == "round_robin"
    [record] = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}/cluster.yaml:3: router.prefill_policy: is deprecated, use prefill_routing"
    )


def test_an_old_key_of_a_node_a_variable_or_an_override_counts_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = "nodes:\n  - {name: m0, role: mixed, port: 8300, router: {decode_policy: round_robin}}\n"

    assert load(tmp_path, node).node("m0").router.decode_routing == "round_robin"
    assert load(tmp_path, NODES, "router.decode_policy=round_robin").router.decode_routing == "round_robin"
    by_variable = load(tmp_path, NODES, env={"KVRELAY_ROUTER__DECODE_POLICY": "round_robin"})
    assert by_variable.router.decode_routing == "round_robin"
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "nodes.m0.router.decode_policy: is deprecated, use decode_routing",
        "router.decode_policy: is deprecated, use decode_routing",
        "router.decode_policy: is deprecated, use decode_routing",
    ]


def test_an_error_in_an_old_key_names_the_new_one_at_the_old_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, NODES + "router: {prefill_policy: random}\n")

    assert caught.value.problems == [
        f"{tmp_path}/cluster.yaml:3: router.prefill_routing: should be 'least_loaded' or 'round_robin', not 'random'"
    ]


def test_both_names_of_a_key_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, NODES + "router:\n  prefill_routing: round_robin\n  prefill_policy: least_loaded\n")

    assert caught.value.problems == [
        f"{tmp_path}/cluster.yaml:5: router.prefill_policy: is the old name of prefill_routing, which is given too"
    ]


def test_new_names_exist_and_old_ones_do_not() -> None:
    for (section, old), new in RENAMED.items():
        fields = type(getattr(ClusterConfig(), section)).model_fields
        assert new in fields
        assert old not in fields
