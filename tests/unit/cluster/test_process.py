"""What a process does to itself before its role starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvrelay.cluster.process import bind_to_cpus, refuse_foreign_packages, require_checkpoint
from kvrelay.cluster.up import process_env, process_specs
from kvrelay.config.cluster_config import ClusterConfig, ModelConfig
from kvrelay.errors import ConfigError
from kvrelay.runtime.runtime_dir import VARIABLE, runtime_dir


def config_with(**node: object) -> ClusterConfig:
    return ClusterConfig.from_data({"nodes": [{"name": "m0", "role": "mixed", "port": 8200, **node}]})


def test_our_own_packages_are_fine() -> None:
    refuse_foreign_packages()


def test_a_foreign_router_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "router").mkdir()
    (tmp_path / "router/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "router", raising=False)

    with pytest.raises(ConfigError) as caught:
        refuse_foreign_packages()

    (problem,) = caught.value.problems
    assert problem.startswith(f"package 'router': {tmp_path}/router would be imported")


def test_a_cpu_this_machine_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ConfigError, match=r"nodes.m0.cpus: this process may not use CPU 99999"):
        bind_to_cpus(config_with(cpus=[99999]).node("m0"))


def test_threads_and_cpus_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    before = os.sched_getaffinity(0)
    cpu = min(before)
    try:
        bind_to_cpus(config_with(cpus=[cpu], threads=3).node("m0"))
        assert os.sched_getaffinity(0) == {cpu}
        assert os.environ["OMP_NUM_THREADS"] == "3"
    finally:
        os.sched_setaffinity(0, before)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model.path: no checkpoint in {tmp_path}"):
        require_checkpoint(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").touch()
    require_checkpoint(ModelConfig(path=str(tmp_path)))


def test_the_processes_of_a_cluster_get_its_overrides() -> None:
    router, node = process_specs(config_with(), Path("c.yaml"))

    assert (router.name, router.role) == ("router", "router")
    assert router.argv[-2:] == ("router", "c.yaml")
    assert (node.name, node.role) == ("m0", "mixed")
    assert node.argv[-4:] == ("mixed", "c.yaml", "--node", "m0")


def test_overrides_go_to_the_processes_where_other_users_cannot_see_them(tmp_path: Path) -> None:
    """Before, a password in ``--set`` was among their arguments until they had set their titles."""
    path = tmp_path / "c.yaml"
    path.write_text("nodes: [{name: m0, role: mixed, port: 1}]\nengine: {kind: fake}\n")
    env = process_env(tmp_path, ["router.port=81", "storage.capacity=1GiB"], {"HOME": "/"})
    assert env["HOME"] == "/"
    assert ClusterConfig.load(path, env=env).router.port == 81
    assert ClusterConfig.load(path, ["router.port=82"], env=env).router.port == 82
    assert ClusterConfig.load(path, env=process_env(tmp_path, ["router.port=83"], env)).router.port == 83


def test_the_runtime_directory_is_private_and_removed(tmp_path: Path) -> None:
    with runtime_dir({"XDG_RUNTIME_DIR": "/" + "x" * 90}) as path:
        assert len(str(path)) < 80
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "socket").touch()
    assert not path.exists()


def test_a_runtime_directory_of_the_parent_is_used_and_kept(tmp_path: Path) -> None:
    with runtime_dir({VARIABLE: str(tmp_path)}) as path:
        assert path == tmp_path
    assert tmp_path.exists()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_runtime_directory_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match="is not private to this user"), runtime_dir({VARIABLE: str(tmp_path)}):
        pass
    with pytest.raises(ConfigError, match="cannot use"), runtime_dir({VARIABLE: str(tmp_path / "none")}):
        pass
    tmp_path.chmod(0o700)
    with runtime_dir({VARIABLE: str(tmp_path)}) as path:
        assert path == tmp_path
