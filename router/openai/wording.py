"""Error messages for invalid fields: one text for every kind of pydantic error."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvrelay.errors import InvalidRequestError
from router.openai.field_types import shown

REASONS: Mapping[str, str] = {
    "missing": "is required",
    "wrong": "{reason}",
    "int_type": "should be an integer",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "bool_type": "should be true or false",
    "string_type": "should be a string",
    "list_type": "should be a list",
    "dict_type": "should be an object",
    "model_type": "should be an object",
    "greater_than": "should be greater than {gt}",
    "greater_than_equal": "should be {ge} or more",
    "less_than_equal": "should be {le} or less",
    "string_too_short": "should have at least {min_length} characters",
    "string_too_long": "should have at most {max_length} characters",
    "too_short": "should have at least {min_length} items",
    "too_long": "should have at most {max_length} items",
}
"""Texts by kind of error; braces contain the violated limit."""

_OTHERWISE = "is not a valid value"
_WITHOUT_THE_VALUE = frozenset({"missing", "wrong", "string_too_long", "too_short", "too_long"})


def first_problem(error: ValidationError) -> InvalidRequestError:
    """Return the first error in ``error``: ``field: reason``, with the value if useful."""
    item = error.errors(include_url=False)[0]
    limits = {name: _number(limit) for name, limit in item.get("ctx", {}).items()}
    reason = REASONS.get(item["type"], _OTHERWISE).format_map(limits)
    # Names of union members are pydantic's affair: a path is made of the request's own names and positions.
    path = [str(part) for part in item["loc"] if isinstance(part, int) or part.replace("_", "").isalpha()]
    if not path:  # a rule between fields begins with the name of the one to change
        return InvalidRequestError(reason, param=reason.partition(":")[0])
    return InvalidRequestError(f"{'.'.join(path)}: {reason}{_value(item)}", param=path[0])


def _number(limit: object) -> object:
    """Return 2 for 2.0."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def _value(item: ErrorDetails) -> str:
    return "" if item["type"] in _WITHOUT_THE_VALUE else f", not {shown(item['input'])}"
