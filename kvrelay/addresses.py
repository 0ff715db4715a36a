"""Addresses of hosts and ports as text: names, IPv4, and IPv6 in brackets before a port."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import re
import socket
import threading
from concurrent.futures import Future
from typing import Any

HOST_PATTERN = r"^[A-Za-z0-9._:%-]+$"
_NETLOC = r"([A-Za-z0-9._-]+|\[[A-Za-z0-9._:%-]+\]):[0-9]{1,5}"
NETLOC_PATTERN = rf"^{_NETLOC}$"
TCP_PATTERN = rf"^tcp://{_NETLOC}$"

_TCP_ADDRESS = re.compile(TCP_PATTERN)
_MAX_PORT = 65535


def netloc(host: str, port: object) -> str:
    """Return ``host:port``, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tcp_address(host: str, port: int) -> str:
    """Return the ZMQ address of ``port`` on ``host``."""
    return f"tcp://{netloc(host, port)}"


def split_tcp_address(address: str) -> tuple[str, int]:
    """Return host and port of ``tcp://host:port``. Raises ValueError if it is invalid."""
    if not _TCP_ADDRESS.fullmatch(address):
        raise ValueError("should be tcp://host:port, with an IPv6 host in brackets")
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    check_host(bare)
    if (host != bare) is not (":" in bare) or int(port) > _MAX_PORT:
        raise ValueError("should be tcp://host:port, with an IPv6 host in brackets")
    return bare, int(port)


def check_host(host: str) -> None:
    """Raise ValueError if ``host`` has a colon and is not an IPv6 address. Names are not checked."""
    if ":" in host or "%" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("should be a host name, an IPv4 address or an IPv6 address such as ::1") from None


def is_loopback(host: str) -> bool:
    """Return whether ``host`` can only be reached from this host. Of names, only localhost is taken to be so."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_named(location: str) -> bool:
    """Return whether ``location`` (``host``, ``host:port``) has the name of a host, other than localhost."""
    bracketed, _, _ = location.removeprefix("[").partition("]")
    host = bracketed if location.startswith("[") else location.partition(":")[0]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.lower() not in ("", "localhost")
    return False


def is_ipv6(address: str) -> bool:
    """Return whether ZMQ address ``address`` has an IPv6 host."""
    return address.startswith("tcp://[")


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return family and address to bind a socket to for ``host``.

    A name that has addresses of both families stands for its IPv4 address. Raises OSError if it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # an empty label, or one of over 63 characters
        raise OSError(errno.EINVAL, f"{host} is no host name") from error
    family, _, _, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    return family, address


def named_host(address: str) -> tuple[str, int] | None:
    """Return name and port of ``tcp://name:port``; None if the host is an IP address, or it is no such address."""
    if not _TCP_ADDRESS.fullmatch(address) or is_ipv6(address):
        return None
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return host, int(port)
    return None


def listening_address(address: str) -> str:
    """Return the address ZMQ shall listen at for ``address``: by itself it only sees the IPv4 addresses of a name.

    A name that cannot be resolved may be that of an interface, which ZMQ knows.
    """
    named = named_host(address)
    if named is None:
        return address
    try:
        _, (host, port, *_) = resolve(*named)
    except OSError:
        return address
    return tcp_address(host, port)


async def has_only_ipv6(host: str, port: int) -> bool:
    """Tell whether no address of ``host`` is IPv4. Raises OSError if it has no address.

    The loop goes on meanwhile. Not in the loop's executor: a resolver may hang for minutes, and the end of the loop
    waits for its executor.
    """
    found: Future[bool] = Future()
    found.set_running_or_notify_cancel()  # the thread sets it even if nobody waits any more

    def look_up() -> None:
        try:
            family, _ = resolve(host, port)
        except Exception as error:
            found.set_exception(error)
        else:
            found.set_result(family == socket.AF_INET6)

    threading.Thread(target=look_up, name="resolver", daemon=True).start()
    return await asyncio.wrap_future(found)


def listen_at(host: str, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens at ``host``; ``::`` includes IPv4. Raises OSError if it cannot be bound."""
    family, address = resolve(host, port)
    dualstack = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=backlog, dualstack_ipv6=dualstack)


def loopback_like(host: str) -> str:
    """Return the loopback address of the IP version of ``host``; that of version 4 for a name."""
    return "::1" if ":" in host else "127.0.0.1"
