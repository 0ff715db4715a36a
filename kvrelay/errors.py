"""Every error kvrelay raises.

KVRelayError
├── ConfigError                 the config file or command line is wrong
├── ProtocolError               a message or call violates the protocol
│   ├── LocalProtocolError      this process is at fault
│   └── RemoteProtocolError     a peer is at fault
├── InvalidRequestError         the client's request is invalid (400)
├── ModelNotFoundError          the model is not served (404)
├── CapacityError               the request can never fit (400)
│   ├── PromptTooLongError
│   └── NeverFitsError
├── QueueFullError              try later (429)
│   └── TTFTLimitError              the first token would come too late
├── NoNodeError                 no node can serve the request now (503)
├── RequestCancelledError       an operator has cancelled the request (410)
├── PreparationError            a long body could not be prepared (503)
├── TransferError               a KV transfer failed (503)
│   ├── TransferTimeoutError
│   ├── PeerLostError
│   ├── GeometryMismatchError
│   └── CorruptKVError
├── StorageError                KV storage cannot be used
│   └── StorageUnavailableError     it cannot be reached or does not answer in time
├── RegistryError               the registry cannot be reached, or does not answer in time
├── DeviceError                 a device, or what this process does with it, is broken for good
├── CheckpointError             the model's files cannot be loaded
├── KernelsUnavailableError     these kernels are unavailable on this machine
└── EngineError                 the engine could not compute a sequence (500)

"No blocks now" and "refused" are values, not exceptions.
"""

from __future__ import annotations


class KVRelayError(Exception):
    """Base class. ``code`` is sent to clients and peers. ``retryable``: the router retries on another node."""

    http_status: int = 500
    code: str = "internal_error"
    retryable: bool = False

    def __init__(self, message: str, *, request_id: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.param = param


class ConfigError(KVRelayError):
    """The config or command line is invalid. ``problems`` lists every problem, one line each."""

    code = "config_error"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ProtocolError(KVRelayError):
    """A message or call violates the protocol."""

    code = "protocol_error"


class LocalProtocolError(ProtocolError):
    """This process would violate the protocol: a bug in kvrelay."""


class RemoteProtocolError(ProtocolError):
    """A peer violates the protocol."""


class InvalidRequestError(KVRelayError):
    """The client's request is invalid. ``param`` names the field."""

    http_status = 400
    code = "invalid_request_error"


class ModelNotFoundError(KVRelayError):
    """The client asked for a model that is not served."""

    http_status = 404
    code = "model_not_found"


class CapacityError(KVRelayError):
    """The cluster can never serve the request, whatever its load."""

    http_status = 400
    code = "capacity_exceeded"


class PromptTooLongError(CapacityError):
    """Prompt plus output exceed the model's length."""

    code = "context_length_exceeded"


class NeverFitsError(CapacityError):
    """The KV cache of the request is larger than a node's pool."""

    code = "kv_cache_too_small"


class QueueFullError(KVRelayError):
    """Too many requests are in progress. The client should retry after ``retry_after_s``."""

    http_status = 429
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class TTFTLimitError(QueueFullError):
    """The first token is predicted to come later than allowed. ``param`` names the header, if that gave the limit."""

    code = "ttft_limit_exceeded"


class NoNodeError(KVRelayError):
    """No node that could serve the request is registered."""

    http_status = 503
    code = "no_node_available"


class RequestCancelledError(KVRelayError):
    """An operator has cancelled the request. The status is one that clients do not retry."""

    http_status = 410
    code = "request_cancelled"


class PreparationError(KVRelayError):
    """The router could not prepare a long body: it took too long, or the worker process died."""

    http_status = 503
    code = "preparation_failed"


class TransferError(KVRelayError):
    """A KV transfer failed."""

    http_status = 503
    code = "transfer_failed"
    retryable = True


class TransferTimeoutError(TransferError):
    """A transfer missed its deadline."""

    code = "transfer_timeout"


class PeerLostError(TransferError):
    """The peer of a request or transfer is lost."""

    code = "peer_lost"


class GeometryMismatchError(TransferError):
    """The KV caches of two peers differ in shape, type, model or protocol version."""

    code = "geometry_mismatch"
    retryable = False


class CorruptKVError(TransferError):
    """Received KV does not match its digest."""

    code = "corrupt_kv"


class StorageError(KVRelayError):
    """KV storage cannot be used as configured: missing directory, permission or library."""

    code = "storage_error"


class StorageUnavailableError(StorageError):
    """KV storage cannot be reached or does not answer in time."""

    code = "storage_unavailable"
    http_status = 503


class RegistryError(KVRelayError):
    """The registry cannot be reached or does not answer in time. Known peers go on without it."""

    code = "registry_unavailable"
    http_status = 503


class DeviceError(KVRelayError):
    """A device, or what this process does with it, is broken for good: nothing it holds can be used any more."""

    code = "device_error"


class CheckpointError(KVRelayError):
    """The model's files are missing, damaged or unsupported."""

    code = "checkpoint_error"


class KernelsUnavailableError(KVRelayError):
    """These kernels are unavailable on this machine."""

    code = "kernels_unavailable"


class EngineError(KVRelayError):
    """The engine could not compute a sequence or a step."""

    code = "engine_error"

    def __init__(self, message: str, *, request_id: str | None = None, retryable: bool = False) -> None:
        super().__init__(message, request_id=request_id)
        self.retryable = retryable
