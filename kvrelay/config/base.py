"""What the sections of the config are made of: their base class, and the types of hosts, ports and sizes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from kvrelay.addresses import HOST_PATTERN, TCP_PATTERN, check_host, split_tcp_address

_SIZE_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def refuse(reason: str, *key: str | int) -> PydanticCustomError:
    """Return the error for an invalid value at ``key``, relative to the section."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason, "key": key})


def _parse_size(value: object) -> object:
    """Return a text such as ``"64MiB"`` as a number of bytes. A number is returned unchanged."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|B|)", value.strip())
    if match is None:
        raise refuse("should be a size such as 67108864, 64MiB or 8GiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _checked_host(host: str) -> str:
    try:
        check_host(host)
    except ValueError as error:
        raise refuse(str(error)) from None
    return host


def _checked_tcp_address(address: str) -> str:
    try:
        split_tcp_address(address)
    except ValueError as error:
        raise refuse(str(error)) from None
    return address


Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, Field(min_length=1, max_length=253, pattern=HOST_PATTERN), AfterValidator(_checked_host)]
TcpAddress = Annotated[str, Field(max_length=300, pattern=TCP_PATTERN), AfterValidator(_checked_tcp_address)]
SizeBytes = Annotated[int, BeforeValidator(_parse_size, json_schema_input_type=int | str)]
DType = Literal["auto", "float32", "bfloat16", "float16"]

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
"""Beginnings of a Redis URL."""
