"""Bounds of the histograms that nodes report in ``Load.histograms``, by name.

Times are in seconds. Their bounds contain those of vLLM's histograms, so that one count gives both families.
"""

from __future__ import annotations

STAGE_BOUNDS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 300.0, 480.0, 600.0, 960.0, 1920.0, 7680.0),
)
"""Of stages of requests."""

FIRST_TOKEN_BOUNDS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.05, 0.06, 0.08, 0.1, 0.2, 0.25, 0.5, 0.75, 1.0, 2.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 60.0, 80.0, 120.0, 160.0, 300.0, 600.0, 640.0, 2560.0),
)
"""Of times to the first token."""

TOKEN_BOUNDS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0),
)
"""Of times between tokens."""

TRANSFER_BOUNDS_BYTES = tuple(float(1 << exponent) for exponent in range(14, 37, 2))
"""Of the KV of one request, in bytes: 16 KiB to 64 GiB."""

SHARE_BOUNDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Of shares, from 0 to 1."""

QUEUE, PREFILL, RESERVATION, HAND_OFF = "queue", "prefill", "reservation", "hand_off"
DECODE, PREEMPTED, INFERENCE, REQUEST = "decode", "preempted", "inference", "request"
STAGES = (QUEUE, PREFILL, RESERVATION, HAND_OFF, DECODE, PREEMPTED, INFERENCE, REQUEST)
"""Stages of a request on a node; ``kvrelay.node.stage_times`` says from when to when."""

FIRST_TOKEN, INTER_TOKEN, PER_OUTPUT_TOKEN = "first_token", "inter_token", "per_output_token"
TRANSFER, TRANSFER_BYTES, TRANSFER_HIDDEN = "transfer", "transfer_bytes", "transfer_hidden"

BOUNDS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(STAGES, STAGE_BOUNDS_S),
    FIRST_TOKEN: FIRST_TOKEN_BOUNDS_S,
    INTER_TOKEN: TOKEN_BOUNDS_S,
    PER_OUTPUT_TOKEN: TOKEN_BOUNDS_S,
    TRANSFER: STAGE_BOUNDS_S,
    TRANSFER_BYTES: TRANSFER_BOUNDS_BYTES,
    TRANSFER_HIDDEN: SHARE_BOUNDS,
}
"""Upper bounds of the buckets of each histogram, without infinity."""
