"""Every kind of mistake in a config is reported, with its key and where it stands; all of them at once."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import ConfigError

NEEDS_KEYS = "can be reached from other hosts: set security.keys (kvrelay keys init), or security.insecure: true"

GOOD = """\
model: {path: models/demo}
cache: {block_size: 16}
nodes:
  - {name: p0, role: prefill, port: 8200}
  - {name: d0, role: decode, port: 8300}
"""

ROUTING = (
    "'least_loaded', 'cache_aware', 'ttft', 'session', 'round_robin', 'random' or 'power_of_two'"  # as in the reference
)

MISTAKES: dict[str, tuple[str, list[str]]] = {
    "unknown section": (GOOD + "cahce: {}\n", ["6: cahce: unknown key; did you mean cache?"]),
    "unknown key": (
        GOOD.replace("block_size: 16", "blok_size: 16"),
        ["2: cache.blok_size: unknown key; did you mean block_size?"],
    ),
    "unknown key of a node": (
        GOOD.replace("8300}", "8300,\n     cache: {num_blokcs: 9}}"),
        ["6: nodes.d0.cache.num_blokcs: unknown key; did you mean num_blocks?"],
    ),
    "faults of an unknown message": (
        GOOD + "faults:\n  messages: {Hartbeat: {drop: 0.1}}\n",
        ["7: faults.messages.Hartbeat: there is no message 'Hartbeat'"],
    ),
    "more than all messages": (
        GOOD + "faults:\n  messages: {Heartbeat: {drop: 1.5}}\n",
        ["7: faults.messages.Heartbeat.drop: should be less than or equal to 1, not 1.5"],
    ),
    "text for a number": (
        GOOD.replace("8200", "'8200'"),
        ["4: nodes.p0.port: should be a valid integer, not '8200'"],
    ),
    "boolean for a number": (
        GOOD.replace("16", "yes"),
        ["2: cache.block_size: should be a valid integer, not True"],
    ),
    "number for a boolean": (
        GOOD + "transfer:\n  checksum: 1\n",
        ["7: transfer.checksum: should be a valid boolean, not 1"],
    ),
    "no choice of that name": (
        GOOD + "router: {decode_routing: fastest}\n",
        [f"6: router.decode_routing: should be {ROUTING}, not 'fastest'"],
    ),
    "earlier name of a key": (
        GOOD + "router: {prefill_policy: fastest}\n",
        [f"6: router.prefill_routing: should be {ROUTING}, not 'fastest'"],
    ),
    "earlier and present name of a key": (
        GOOD + "router:\n  prefill_policy: round_robin\n  prefill_routing: round_robin\n",
        ["7: router.prefill_policy: is the old name of prefill_routing, which is given too"],
    ),
    "a limit that nothing is predicted for": (
        GOOD + "router: {ttft_slo_s: 2.0}\n",
        ["6: router.ttft_slo_s: needs prefill_routing: ttft, not cache_aware"],
    ),
    "no room for one body": (
        GOOD + "router: {max_total_body_bytes: 8MiB}\n",
        ["6: router.max_total_body_bytes: 8388608 is below max_body_bytes (16777216)"],
    ),
    "no room for one body in each worker": (
        GOOD + "router: {workers: 4, max_total_body_bytes: 60MiB}\n",
        ["6: router.max_total_body_bytes: 62914560, shared by 4 workers, is below max_body_bytes (16777216)"],
    ),
    "too many workers": (
        GOOD + "router: {workers: 65}\n",
        ["6: router.workers: should be less than or equal to 64, not 65"],
    ),
    "below its bound": (GOOD.replace("16", "0"), ["2: cache.block_size: should be greater than or equal to 1, not 0"]),
    "above its bound": (
        GOOD.replace("8300", "83000"),
        ["5: nodes.d0.port: should be less than or equal to 65535, not 83000"],
    ),
    "not a number": (
        GOOD + "transfer: {lease_s: .nan}\n",
        ["6: transfer.lease_s: should be a finite number, not nan"],
    ),
    "ratio outside 0 to 1": (
        GOOD + "scheduler:\n  new_token_ratio: {init: 1.5}\n",
        ["7: scheduler.new_token_ratio.init: should be less than or equal to 1, not 1.5"],
    ),
    "budget below the decodes of a step": (
        GOOD + "scheduler: {max_num_batched_tokens: 63}\n",
        [
            "5: nodes.d0.scheduler.max_num_batched_tokens: 63 is below max_num_seqs (64): "
            "a step takes one token of every running decode"
        ],
    ),
    "min above init": (
        GOOD + "scheduler:\n  new_token_ratio:\n    init: 0.2\n    min: 0.3\n",
        ["9: scheduler.new_token_ratio.min: 0.3 is above init (0.2): the ratio falls from init to min"],
    ),
    "min blocks above blocks": (
        GOOD + "scheduler: {fixed_blocks: {blocks: 2,\n  min_blocks: 3}}\n",
        ["7: scheduler.fixed_blocks.min_blocks: 3 is above blocks (2): the reserve falls from blocks to min_blocks"],
    ),
    "no decay steps": (
        GOOD + "scheduler: {sglang: {decay_steps: 0}}\n",
        ["6: scheduler.sglang.decay_steps: should be greater than or equal to 1, not 0"],
    ),
    "peers lost between heartbeats": (
        GOOD + "cluster: {heartbeat_s: 2.0, peer_timeout_s: 1.0}\n",
        ["6: cluster.peer_timeout_s: 1.0 is not above heartbeat_s (2.0): every peer would be lost"],
    ),
    "a node's own min above the cluster's init": (
        GOOD.replace("8300}", "8300, scheduler: {new_token_ratio: {min: 0.9}}}"),
        ["5: nodes.d0.scheduler.new_token_ratio.min: 0.9 is above init (0.7): the ratio falls from init to min"],
    ),
    "size without a meaning": (
        GOOD + "transfer: {max_inflight_bytes: 8 parsecs}\n",
        ["6: transfer.max_inflight_bytes: should be a size such as 67108864, 64MiB or 8GiB"],
    ),
    "two nodes of one name": (
        GOOD.replace("d0", "p0"),
        ["5: nodes.1.name: another node has the name p0"],
    ),
    "a node called router": (
        GOOD.replace("d0", "router"),
        ["5: nodes.router.name: router is reserved and cannot be the name of a node"],
    ),
    "two nodes at one port": (
        GOOD.replace("8300", "8200"),
        ["5: nodes.d0.port: 127.0.0.1:8200 is also the address of node p0"],
    ),
    "a node at the router's port": (
        GOOD.replace("8300", "8000"),
        ["5: nodes.d0.port: 127.0.0.1:8000 is also the address of router.port"],
    ),
    "control at the router's port": (
        GOOD + 'router:\n  control: "tcp://127.0.0.1:8000"\n',
        ["7: router.control: 127.0.0.1:8000 is also the address of router.port"],
    ),
    "control at the router's IPv6 port": (
        GOOD + 'router:\n  host: "::1"\n  control: "tcp://[::1]:8000"\n',
        ["8: router.control: [::1]:8000 is also the address of router.port"],
    ),
    "two nodes at one IPv6 address": (
        GOOD.replace("port: 8200", 'host: "::1", port: 8200').replace("port: 8300", 'host: "::1", port: 8200'),
        ["5: nodes.d0.port: [::1]:8200 is also the address of node p0"],
    ),
    "control with an IPv6 host that lacks its brackets": (
        GOOD + 'router: {control: "tcp://::1:8100"}\n',
        ["6: router.control: cannot be 'tcp://::1:8100'"],
    ),
    "control at a port there cannot be": (
        GOOD + 'router: {control: "tcp://[::1]:81000"}\n',
        ["6: router.control: should be tcp://host:port, with an IPv6 host in brackets"],
    ),
    "nodes for other hosts without keys": (
        GOOD.replace("port: 8200", "host: 10.0.0.1, port: 8200").replace("port: 8300", "host: node2, port: 8300")
        + 'router: {control: "tcp://0.0.0.0:8100"}\n',
        [
            f"4: nodes.p0.host: 10.0.0.1 {NEEDS_KEYS}",
            f"5: nodes.d0.host: node2 {NEEDS_KEYS}",
            f"6: router.control: tcp://0.0.0.0:8100 {NEEDS_KEYS}",
        ],
    ),
    "host in brackets": (GOOD + 'router: {host: "[::1]"}\n', ["6: router.host: cannot be '[::1]'"]),
    "host that is no IPv6 address": (
        GOOD.replace("port: 8200", 'host: "1::2::3", port: 8200'),
        ["4: nodes.p0.host: should be a host name, an IPv4 address or an IPv6 address such as ::1"],
    ),
    "empty text": (
        GOOD + "storage: {path: ''}\n",
        ["6: storage.path: should have at least 1 character, not ''"],
    ),
    "empty alias": (
        GOOD.replace("models/demo", "models/demo, aliases: [a, '']"),
        ["1: model.aliases.1: should have at least 1 character, not ''"],
    ),
    "control is no address": (
        GOOD + "router: {control: localhost}\n",
        ["6: router.control: cannot be 'localhost'"],
    ),
    "prefill without decode": (
        GOOD.replace("role: decode", "role: mixed"),
        ["3: nodes: a prefill node needs a decode node, and there is none"],
    ),
    "decode without prefill": (
        GOOD.replace("role: prefill", "role: mixed"),
        ["3: nodes: a decode node needs a prefill node, and there is none"],
    ),
    "no node at all": (
        "model: {path: x}\n",
        ["1: nodes: no node can serve: add a mixed node, or a prefill and a decode node"],
    ),
    "node without a role": (GOOD.replace("role: decode, ", ""), ["5: nodes.d0.role: is missing"]),
    "block sizes differ": (
        GOOD.replace("8300}", "8300, cache: {block_size: 32}}"),
        ["5: nodes.d0.cache.block_size: must be equal on all nodes: 32 here, 16 on p0"],
    ),
    "key given twice": (
        GOOD + "cache: {num_blocks: 64}\n",
        ["6: cache: given twice, first in line 2"],
    ),
    "section left empty": (GOOD + "scheduler:\n", ["6: scheduler: should hold keys, not nothing"]),
    "nodes by name": (
        "nodes:\n  p0: {role: mixed}\n",
        ["1: nodes: should be a list, not {'p0': {'role': 'mixed'}}"],
    ),
    "pinned to no CPU": (GOOD.replace("8300}", "8300, cpus: []}"), ["5: nodes.d0.cpus: should not be empty"]),
    "storage without prefix caching": (
        GOOD.replace("block_size: 16", "prefix_caching: false") + "storage: {backend: file, capacity: 8GiB}\n",
        [
            "4: nodes.p0.cache.prefix_caching: must be true with storage: blocks are stored by their hash",
            "5: nodes.d0.cache.prefix_caching: must be true with storage: blocks are stored by their hash",
        ],
    ),
    "a link between devices where there is none": (
        GOOD.replace("8300}", "8300, engine: {kind: torch}}") + "transfer: {link: cuda}\n",
        ["4: nodes.p0.transfer.link: cuda copies between pools of device engines: engine.kind torch, paddle-device"],
    ),
    "a link between devices, and one node without": (
        GOOD.replace("8300}", "8300, engine: {fake: {device_pool: false}}}")
        + "engine: {kind: fake, fake: {device_pool: true}}\ntransfer: {link: cuda}\n",
        ["5: nodes.d0.transfer.link: cuda copies between pools of device engines: engine.kind torch, paddle-device"],
    ),
    "registry without a place": (
        GOOD + "registry: {kind: redis}\n",
        ["6: registry.url: redis needs a url that begins with redis://, rediss://, unix://"],
    ),
    "registry elsewhere": (
        GOOD + "registry:\n  kind: redis\n  url: http://:secret@localhost\n",
        ["8: registry.url: redis needs a url that begins with redis://, rediss://, unix://"],
    ),
    "unknown quantization": (
        GOOD + "engine:\n  quantization: w4a16\n",
        ["7: engine.quantization: should be 'none', 'w8a8', 'w8a16' or 'fp8', not 'w4a16'"],
    ),
    "float8 on another engine": (
        GOOD.replace("8300}", "8300, engine: {kind: torch}}") + "engine: {quantization: fp8}\n",
        ["4: nodes.p0.engine.quantization: fp8 needs engine.kind: torch, not paddle"],
    ),
    "int8 on the torch engine": (
        GOOD + "engine: {kind: torch, quantization: w8a8}\n",
        [
            "4: nodes.p0.engine.quantization: w8a8 is not for engine.kind: torch",
            "5: nodes.d0.engine.quantization: w8a8 is not for engine.kind: torch",
        ],
    ),
    "deterministic on a CPU": (
        GOOD.replace("8300}", "8300, engine: {kind: torch}}") + "engine: {deterministic: true}\n",
        [
            "4: nodes.p0.engine.deterministic: true needs engine.kind: torch and engine.device: gpu: "
            "engine.kernels: native of paddle needs no such mode",
            "5: nodes.d0.engine.deterministic: true needs engine.kind: torch and engine.device: gpu",
        ],
    ),
    "deterministic in float8": (
        GOOD + "engine: {kind: torch, device: gpu, quantization: fp8, deterministic: true}\n",
        [
            "4: nodes.p0.engine.deterministic: true is not for quantization: fp8, whose sums may depend on the batch",
            "5: nodes.d0.engine.deterministic: true is not for quantization: fp8, whose sums may depend on the batch",
        ],
    ),
    "deterministic on one node only": (
        GOOD.replace("8300}", "8300, engine: {deterministic: false}}")
        + "engine: {kind: torch, device: gpu, deterministic: true}\n",
        ["5: nodes.d0.engine.deterministic: must be equal on all nodes: False here, True on p0"],
    ),
    "not a mapping": ("- a\n- b\n", ["1: should contain sections such as model: and nodes:, not ['a', 'b']"]),
    "empty file": ("", ["1: should contain sections such as model: and nodes:, not nothing"]),
    "not YAML": ("model: {path: x\nnodes: []\n", ["2: not YAML: expected ',' or '}', but got ':'"]),
    "endless": ("a: &a [*a]\n", ["1: not YAML: an alias in the value that it stands for"]),
    "many at once": (
        dedent("""\
            model: {pth: x}
            router:
              port: 0
            cache: {block_size: 0}
            nodes:
              - {name: p0, role: prefil, port: 8200}
              - {name: p0, role: decode, port: 8200}
            """),
        [
            "1: model.pth: unknown key; did you mean path?",
            "3: router.port: should be greater than or equal to 1, not 0",
            "4: cache.block_size: should be greater than or equal to 1, not 0",
            "6: nodes.0.role: should be 'prefill', 'decode' or 'mixed', not 'prefil'",
            "7: nodes.1.name: another node has the name p0",
            "7: nodes.1.port: 127.0.0.1:8200 is also the address of node p0",
        ],
    ),
}


def problems_of(path: Path, *overrides: str, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.load(path, overrides, env or {})
    return caught.value.problems


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_reported_with_key_and_line(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)

    assert problems_of(path) == [f"{path}:{line}" for line in expected]


def test_without_a_mistake_it_loads(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(GOOD)

    assert [node.name for node in ClusterConfig.load(path, env={}).nodes] == ["p0", "d0"]


def test_missing_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "no.yaml") == [f"{tmp_path}/no.yaml: No such file or directory"]


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(bytes(range(256)))

    assert problems_of(path) == [f"{path}: not a text file"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("router.port=x", "--set router.port=x: router.port: should be a valid integer, not 'x'"),
        ("router.prt=1", "--set router.prt=1: router.prt: unknown key; did you mean port?"),
        ("speculative.ngram_min=9", "--set speculative.ngram_min=9: speculative.ngram_min: 9 is above ngram_max (4)"),
        ("nodes.d9.port=1", "--set nodes.d9.port=1: no node is called 'd9'"),
        (
            "nodes.d0.port=70000",
            "--set nodes.d0.port=70000: nodes.d0.port: should be less than or equal to 65535, not 70000",
        ),
        ("cache.block_size.x=1", "--set cache.block_size.x=1: block_size has no key x"),
        ("router.port", "--set router.port: should read key=value, such as router.port=8001"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(GOOD)

    assert problems_of(path, override) == [expected]


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(GOOD)

    assert problems_of(path, env={"KVRELAY_ROUTER__PORT": "-1", "KVRELAY_NODES__D0__PRT": "1"}) == [
        "env KVRELAY_NODES__D0__PRT: nodes.d0.prt: unknown key; did you mean port?",
        "env KVRELAY_ROUTER__PORT: router.port: should be greater than or equal to 1, not -1",
    ]


@pytest.mark.parametrize(
    "value", ["[{}]", "{{a: {}}}", "[[{}, 1]]"], ids=["in a list", "in a mapping", "in a list in a list"]
)
@pytest.mark.parametrize("url", ["redis://:sekret@h:1/0", "rediss://me:sekret@h", "unix:///run/r?db=0&password=sekret"])
def test_no_message_shows_a_password(tmp_path: Path, value: str, url: str) -> None:
    (tmp_path / "cluster.yaml").write_text(GOOD + f"storage: {{backend: redis, url: {value.format(repr(url))}}}\n")
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.load(tmp_path / "cluster.yaml", env={})
    assert "storage.url: should be a valid string, not" in str(caught.value)
    assert "sekret" not in str(caught.value)


@pytest.mark.parametrize("security", ["keys: somewhere", "insecure: true"])
def test_with_keys_or_if_told_so_processes_listen_for_other_hosts(tmp_path: Path, security: str) -> None:
    (tmp_path / "cluster.yaml").write_text(
        GOOD.replace("port: 8200", "host: 10.0.0.1, port: 8200")
        + f'router: {{control: "tcp://0.0.0.0:8100"}}\nsecurity: {{{security}}}\n'
    )
    assert ClusterConfig.load(tmp_path / "cluster.yaml", env={}).node("p0").host == "10.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_keys(tmp_path: Path, host: str) -> None:
    (tmp_path / "cluster.yaml").write_text(GOOD.replace("port: 8200", f'host: "{host}", port: 8200'))
    assert ClusterConfig.load(tmp_path / "cluster.yaml", env={}).node("p0").host == host
