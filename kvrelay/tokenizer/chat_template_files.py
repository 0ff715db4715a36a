"""Loads a checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvrelay.checkpoint_files import read_json_object
from kvrelay.errors import CheckpointError

_DEFAULT, _WITH_TOOLS = "default", "tool_use"


class ChatTemplates(NamedTuple):
    """A checkpoint's chat templates. ``with_tools``: the one for chats with tools, if it has one of its own."""

    default: str | None
    with_tools: str | None = None


def read_chat_templates(model_dir: Path, settings: Mapping[str, Any]) -> ChatTemplates:
    """Return the templates.

    ``settings``: the content of ``tokenizer_config.json``. Files of templates go before what that says;
    ``chat_template.json`` comes last. Raises CheckpointError for one that is not text.
    """
    files = dict(_template_files(model_dir))
    if files:
        return ChatTemplates(files.get(_DEFAULT), files.get(_WITH_TOOLS))
    path = model_dir / "tokenizer_config.json"
    setting = settings.get("chat_template")
    if setting is None:
        path = model_dir / "chat_template.json"
        setting = read_json_object(path, required=False).get("chat_template")
    named = _by_name(setting, path) if isinstance(setting, list | dict) else {_DEFAULT: setting}
    templates = ChatTemplates(named.get(_DEFAULT), named.get(_WITH_TOOLS))
    for template in templates:
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"{path}: chat_template should be text, not {template!r:.80}")
    return templates


def _template_files(model_dir: Path) -> list[tuple[str, str]]:
    paths = [(_DEFAULT, model_dir / "chat_template.jinja")]
    paths += [(path.stem, path) for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja"))]
    try:
        return [(name, path.read_text("utf-8-sig")) for name, path in paths if path.is_file()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"a chat template in {model_dir} cannot be read: {error}") from error


def _by_name(setting: list[Any] | dict[str, Any], path: Path) -> Mapping[str, Any]:
    """Return several templates by their names."""
    if isinstance(setting, dict):
        return setting
    try:
        return {item["name"]: item["template"] for item in setting}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: chat_template should list objects with name and template") from error
