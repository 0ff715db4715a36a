"""The configuration reference."""

from __future__ import annotations

from pathlib import Path

from kvrelay.cluster.config_reference import markdown
from kvrelay.config.cluster_config import ClusterConfig

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_committed_page_is_what_the_models_say() -> None:
    assert PAGE.read_text() == markdown(), "run: kvrelay config schema --format markdown > docs/configuration.md"


def test_every_key_of_every_section_is_on_the_page() -> None:
    page = markdown()
    for name, field in ClusterConfig.model_fields.items():
        keys = getattr(field.annotation, "model_fields", {})
        missing = [key for key in keys if f"`{key}`" not in page and f"`{name}.{key}`" not in page]
        assert missing == [], name
