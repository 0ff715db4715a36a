"""Whether there are traces. Imports their library only if there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrelay.config.sections import RouterConfig
from kvrelay.errors import ConfigError

if TYPE_CHECKING:
    from router.tracing import TimelineOf, Tracing

KEPT_TIMELINES = 4096
"""Timelines that the machine keeps while there are traces: they must outlive ``router.tracing.SETTLE_S``."""


def require_library(config: RouterConfig) -> None:
    """Raise ConfigError if traces are configured and their library is not installed."""
    if config.otlp_endpoint is not None:
        try:
            import router.tracing  # noqa: F401, PLC0415 (an extra, which takes long to import)
        except ImportError as error:
            raise ConfigError(["router.otlp_endpoint needs OpenTelemetry: pip install 'kvrelay[otel]'"]) from error


def open_tracing(config: RouterConfig, timeline_of: TimelineOf) -> Tracing | None:
    """Return what sends traces, or None. Raises ConfigError as ``require_library``."""
    require_library(config)
    if config.otlp_endpoint is None:
        return None
    from router.tracing import Tracing  # noqa: PLC0415

    return Tracing(timeline_of, config.otlp_endpoint, config.trace_sample_ratio)
