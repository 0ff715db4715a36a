"""What ``scripts/gpu-check`` uses of kvrelay works with the few packages of a machine that has a GPU and no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path

class Missing:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"llguidance", "orjson", "pydantic", "starlette", "tokenizers", "yaml", "zmq"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import cache_messager.links.cuda, cache_messager.links.ipc, cache_messager.machine, cache_messager.mover
import kvrelay.engine.compute_thread, kvrelay.engine.device.load, kvrelay.engine.presets, kvrelay.node.plans
from kvrelay.engine.tiny import write_tiny_checkpoint

write_tiny_checkpoint(Path(sys.argv[1]), "llama", tokenizer=False)
"""


def test_engine_links_and_checkpoints_need_no_other_package(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True, timeout=240)
    assert (tmp_path / "model.safetensors").exists()


CLUSTER = """
import sys

class Missing:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"llguidance", "mooncake", "nixl_cu13", "orjson", "paddle", "psutil", "redis"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import cache_messager.__main__, decode_node.__main__, prefill_node.__main__, router.__main__
import kvrelay.cluster.cli, kvrelay.cluster.client, kvrelay.cluster.up, kvrelay.engine.device.load, kvrelay.engine.load
import router.server, router.service
assert "torch" not in sys.modules
"""


def test_all_processes_of_a_cluster_can_be_imported_without_paddle_and_redis() -> None:
    subprocess.run([sys.executable, "-c", CLUSTER], check=True, timeout=240)
