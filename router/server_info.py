"""What operators learn of this cluster's settings: the config without secrets."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

import kvrelay
from router.service import RouterService


def server_info(service: RouterService) -> dict[str, Any]:
    """Return version, model and config as JSON data.

    Of keys the config has only the paths of their files. URLs of stores and registries are left out: passwords may be
    in them.
    """
    config = service.config.model_dump(mode="json")  # of each secret only stars
    endpoint = config["router"]["otlp_endpoint"]
    if endpoint is not None:
        config["router"]["otlp_endpoint"] = _without_user(endpoint)
    return {
        "version": kvrelay.__version__,
        "model": service.model.name,
        "max_model_len": service.max_model_len,
        "vocab_size": service.model.vocab_size,
        "kvrelay_config": config,
    }


def _without_user(url: str) -> str:
    """Return ``url`` without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
