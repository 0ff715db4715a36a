"""From the storage section of a config to a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from storage_rooms import GEOMETRY, HandClock, backend_of

from kvrelay.config.storage import StorageConfig
from kvstore.storage.factory import make_store

URL = "redis://user:hunter2@localhost:6379/1"


def section(**keys: Any) -> StorageConfig:
    return StorageConfig.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "backend"),
    [
        ({}, "NoBackend"),
        ({"backend": "memory", "capacity": "1MiB"}, "MemoryBackend"),
        ({"backend": "file", "path": "kv", "capacity": "8GiB"}, "FileBackend"),
        ({"backend": "redis", "url": URL, "ttl_s": 60}, "RedisBackend"),
        ({"backend": "redis", "url": "unix:///run/redis.sock?db=1"}, "RedisBackend"),
        ({"backend": "redis", "url": URL, "payload": "owner", "path": "kv"}, "OwnerBackend"),
        ({"backend": "mooncake", "master": "host:50051", "capacity": "1GiB"}, "MooncakeBackend"),
    ],
)
def test_each_section_makes_its_backend(keys: dict[str, Any], backend: str) -> None:
    assert type(backend_of(make_store(section(**keys), GEOMETRY, HandClock()))).__name__ == backend


def test_making_a_store_touches_nothing(tmp_path: Path) -> None:
    make_store(section(backend="file", path=str(tmp_path / "kv")), GEOMETRY, HandClock())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"backend": "tape"}, "'none', 'memory', 'file', 'redis' or 'mooncake'"),
        ({"backend": "file", "url": URL}, "file does not use url"),
        ({"backend": "memory", "path": "kv", "ttl_s": 1}, "memory does not use path, ttl_s"),
        ({"backend": "redis"}, "redis needs a url"),
        ({"backend": "redis", "url": "http://:hunter2@host"}, "begins with redis://, rediss://, unix://"),
        ({"backend": "mooncake", "master": "host"}, "master"),
        ({"backend": "file", "capacity": 1}, "capacity"),
        ({"backend": "file", "timeout_s": 0}, "timeout_s"),
    ],
)
def test_mistakes(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        section(**keys)
    [error] = caught.value.errors(include_input=False, include_url=False)
    assert told in f"{error['loc']} {error['msg']}"
    assert "hunter2" not in error["msg"]


def test_a_node_may_do_without_what_its_cluster_has() -> None:
    assert section(backend="none", url=URL, ttl_s=5).backend == "none"


def test_a_password_shows_nowhere() -> None:
    config = section(backend="redis", url=URL)
    assert "hunter2" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"


def test_a_backend_that_the_factory_does_not_know_is_an_error_and_no_file_store(tmp_path: Path) -> None:
    values: dict[str, Any] = {"backend": "tape", "path": str(tmp_path), "capacity": 1 << 20, "timeout_s": 1.0}
    unchecked = StorageConfig.model_construct(**values)

    with pytest.raises(AssertionError, match="tape"):
        make_store(unchecked, GEOMETRY, HandClock())
