"""Kinds of link that move KV blocks from P's pool to D's: one file per kind, named as in ``transfer.link``.

``interface`` defines the link protocol. To add a kind, add a file with a class ``Link`` here, and its name to
``LinkKind`` in ``kvrelay.config.sections``. ``payload`` is shared by the kinds that send the bytes over ZMQ.
"""

from __future__ import annotations

from importlib import import_module

from cache_messager.links.interface import KVLink


def link_class(kind: str) -> type[KVLink]:
    """Return the link class of ``kind``, which may come from a peer. Raises ValueError if there is none."""
    try:
        link: type[KVLink] = import_module(f"{__name__}.{kind}").Link
    except (ImportError, AttributeError) as error:
        raise ValueError(f"links of kind {kind!r:.40} are not possible here: {error}") from error
    return link
