"""Who may import whom: the router and the messager never load Paddle, the core knows no role."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROLES = {"router", "kvstore", "cache_messager", "prefill_node", "decode_node"}
HEAVY = {"paddle", "torch", "transformers"}
WEB = {"starlette", "uvicorn", "httpx", "redis"}

FORBIDDEN = {
    "kvrelay.protocol.codec": ROLES | HEAVY | WEB | {"kvrelay.engine", "kvrelay.cluster"},
    "kvrelay.runtime.shell": ROLES | HEAVY | WEB | {"kvrelay.engine", "kvrelay.cluster"},
    "kvrelay.config.cluster_config": ROLES | HEAVY | WEB | {"kvrelay.engine", "kvrelay.cluster"},
    "kvrelay.engine.fake": ROLES | HEAVY | WEB | {"kvrelay.cluster"},
    "kvstore.blocks.kv_cache": (ROLES - {"kvstore"}) | HEAVY | WEB | {"kvrelay.engine", "kvrelay.cluster"},
    "cache_messager.machine": (ROLES - {"kvstore", "cache_messager"})
    | HEAVY
    | WEB
    | {"kvrelay.engine", "kvrelay.cluster"},
    "prefill_node.machine": HEAVY | WEB | {"router", "decode_node", "kvrelay.cluster"},
    "decode_node.machine": HEAVY | WEB | {"router", "prefill_node", "kvrelay.cluster"},
    "router.machine": HEAVY | {"prefill_node", "decode_node", "cache_messager", "kvstore", "kvrelay.engine"},
}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_a_module_loads_only_what_it_may(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert not {name for name in loaded for bad in FORBIDDEN[module] if name == bad or name.startswith(bad + ".")}
