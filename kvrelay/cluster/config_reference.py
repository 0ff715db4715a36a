"""The configuration reference, written from the config's own models: what is true there is true in the docs."""

from __future__ import annotations

import json
from typing import Any

from kvrelay.config.cluster_config import ClusterConfig

_HEAD = """# Configuration

One YAML file describes a cluster; every process reads the same one. This page is written by
`kvrelay config schema --format markdown` from the models that check the file (`kvrelay/config/sections.py`).

Where a value comes from, later ones first: `--set section.key=value` (nodes by name: `--set nodes.d0.port=8301`),
the environment (`KVRELAY_ROUTER__PORT=8001`), the node's own section in the file, the section of the whole cluster,
the default. Unknown keys are refused. `kvrelay config check FILE` lists every problem with its line; so does any other
command that reads the file, and ends with status 2.
"""


def markdown() -> str:
    """Return the reference as a Markdown page: a table for each section."""
    schema = ClusterConfig.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    parts = [_HEAD]
    for name, field in schema["properties"].items():
        definition = _target(field, definitions)
        if definition is not None:
            parts.append(_section(name, definition, definitions))
    parts.append(_nodes(definitions["NodeConfig"], definitions, set(schema["properties"])))
    return "\n".join(parts)


def _target(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """Return the section ``field`` refers to, or None if it is a plain key."""
    reference = field.get("$ref") or (field.get("allOf") or [{}])[0].get("$ref")
    found = definitions.get(reference.rpartition("/")[2]) if reference else None
    return found if found is not None and "properties" in found else None


def _section(path: str, definition: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the table of one section, and after it those of the sections inside."""
    inner = {key: _target(field, definitions) for key, field in definition["properties"].items()}
    rows = [_row(key, field, definitions) for key, field in definition["properties"].items() if inner[key] is None]
    text = "\n".join([f"## `{path}`", "", definition.get("description", ""), "", *_table(rows)])
    nested = [_section(f"{path}.{key}", found, definitions) for key, found in inner.items() if found is not None]
    return "\n".join([text, *nested])


def _nodes(definition: dict[str, Any], definitions: dict[str, Any], sections: set[str]) -> str:
    fields = {key: field for key, field in definition["properties"].items() if key not in sections}
    rows = [_row(key, field, definitions) for key, field in fields.items()]
    intro = "A list, one entry a node. Beside these keys each may have any section above, for itself alone."
    return "\n".join(["## `nodes`", "", intro, "", *_table(rows)])


def _table(rows: list[str]) -> list[str]:
    return ["| key | values | default | meaning |", "|---|---|---|---|", *rows, ""]


def _row(key: str, field: dict[str, Any], definitions: dict[str, Any]) -> str:
    default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
    meaning = field.get("description", "").replace("|", "\\|")
    return f"| `{key}` | {_values(field, definitions)} | {default} | {meaning} |"


def _values(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the type or the choices of ``field``, with its bounds."""
    if "$ref" in field:
        return _values(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in field:
        return " or ".join(_values(choice, definitions) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    bounds = [
        f"{sign} {field[name]}"
        for name, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if name in field
    ]
    kind = (
        f"{field.get('type', 'any')} of {_values(field['items'], definitions)}" if "items" in field else field["type"]
    )
    return ", ".join([kind, *bounds])
