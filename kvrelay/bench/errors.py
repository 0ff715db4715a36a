"""What ends a benchmark without a result."""

from __future__ import annotations

from kvrelay.errors import KVRelayError


class BenchError(KVRelayError):
    """The benchmark cannot run: the server does not answer or refuses, or a file or an option is unusable."""

    code = "bench_error"
