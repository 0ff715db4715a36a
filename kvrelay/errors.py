"""Every error kvrelay raises.

KVRelayError
├── ConfigError                 the config file or command line is wrong
├── ProtocolError               a message breaks the protocol
│   ├── LocalProtocolError      we were about to send or do it
│   └── RemoteProtocolError     a peer sent it
├── InvalidRequestError         the client's request is wrong (400)
├── ModelNotFoundError          no such model here (404)
├── CapacityError               the request can never fit (400)
│   ├── PromptTooLongError
│   └── NeverFitsError
├── QueueFullError              try later (429)
├── NoNodeError                 nothing can serve now (503)
├── PreparationError            a long body could not be made a prompt (503)
├── TransferError               KV did not get across (503)
│   ├── TransferTimeoutError
│   ├── PeerLostError
│   ├── GeometryMismatchError
│   └── CorruptKVError
├── StorageError                KV storage cannot be used
│   └── StorageUnavailableError     it cannot be reached, or does not answer in time
├── RegistryError               the registry cannot be reached, or does not answer in time
├── DeviceError                 a device, or what this process does with it, is broken for good
├── CheckpointError             the model's files cannot be loaded
└── EngineError                 the engine could not compute a sequence (500)

"No blocks now" and "refused" are values, not exceptions.
"""

from __future__ import annotations


class KVRelayError(Exception):
    """Base of all. ``code`` goes to clients and over the wire; ``retryable`` tells the router to try elsewhere."""

    http_status: int = 500
    code: str = "internal_error"
    retryable: bool = False

    def __init__(self, message: str, *, request_id: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.param = param


class ConfigError(KVRelayError):
    """The config or command line is wrong; ``problems`` lists every fault found, one line each."""

    code = "config_error"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ProtocolError(KVRelayError):
    """A message breaks the protocol."""

    code = "protocol_error"


class LocalProtocolError(ProtocolError):
    """Our own side was about to break the protocol: a bug here."""


class RemoteProtocolError(ProtocolError):
    """A peer sent what the protocol does not allow; it is answered and dropped."""


class InvalidRequestError(KVRelayError):
    """The client's request is wrong; ``param`` names the field."""

    http_status = 400
    code = "invalid_request_error"


class ModelNotFoundError(KVRelayError):
    """The client asked for a model that is not served here."""

    http_status = 404
    code = "model_not_found"


class CapacityError(KVRelayError):
    """The request can never be served by this cluster, whatever else it is doing."""

    http_status = 400
    code = "capacity_exceeded"


class PromptTooLongError(CapacityError):
    """Prompt and output do not fit the model's length."""

    code = "context_length_exceeded"


class NeverFitsError(CapacityError):
    """The KV cache of this request is larger than a node's whole pool."""

    code = "kv_cache_too_small"


class QueueFullError(KVRelayError):
    """Too many requests wait; the client should come back after ``retry_after_s``."""

    http_status = 429
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoNodeError(KVRelayError):
    """No node that could serve the request is registered."""

    http_status = 503
    code = "no_node_available"


class PreparationError(KVRelayError):
    """The router could not make a prompt of a long body: it took too long, or the process that did it died."""

    http_status = 503
    code = "preparation_failed"


class TransferError(KVRelayError):
    """KV did not get from P to D."""

    http_status = 503
    code = "transfer_failed"
    retryable = True


class TransferTimeoutError(TransferError):
    """A transfer missed its deadline."""

    code = "transfer_timeout"


class PeerLostError(TransferError):
    """The process at the other end is gone."""

    code = "peer_lost"


class GeometryMismatchError(TransferError):
    """The two ends' KV caches differ in shape, type, model or protocol version."""

    code = "geometry_mismatch"
    retryable = False


class CorruptKVError(TransferError):
    """KV arrived with another digest than it was sent with."""

    code = "corrupt_kv"


class StorageError(KVRelayError):
    """KV storage cannot be used as configured: no such place, no permission, a library that is not there."""

    code = "storage_error"


class StorageUnavailableError(StorageError):
    """KV storage cannot be reached now, or does not answer in time."""

    code = "storage_unavailable"
    http_status = 503


class RegistryError(KVRelayError):
    """The registry cannot be reached, or does not answer in time. Whoever is known goes on without it."""

    code = "registry_unavailable"
    http_status = 503


class DeviceError(KVRelayError):
    """A device, or what this process does with it, is broken for good: nothing it holds can be used any more."""

    code = "device_error"


class CheckpointError(KVRelayError):
    """The model's files are missing, damaged or of a kind this engine does not read."""

    code = "checkpoint_error"


class EngineError(KVRelayError):
    """The engine could not compute a sequence, or a whole step."""

    code = "engine_error"

    def __init__(self, message: str, *, request_id: str | None = None, retryable: bool = False) -> None:
        super().__init__(message, request_id=request_id)
        self.retryable = retryable
