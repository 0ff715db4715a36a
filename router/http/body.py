"""Reads and prepares the body of a request."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope

from kvrelay.errors import NoNodeError
from kvrelay.protocol.messages.base import ErrorInfo
from router.body_memory import BodyShare
from router.frontend import STOPPING, Frontend
from router.http.asgi import Watching
from router.openai.errors import AnswerError
from router.openai.generation import ClientLeftError
from router.preparation import Job, Outcome, Task, too_large


async def prepared(task: Task, service: Frontend, scope: Scope, receive: Receive) -> Outcome:
    """Return the prepared body of the request in ``scope``.

    Raises AnswerError or another KVRelayError if it cannot be served, ClientLeftError if the client disconnects.
    """
    try:
        return await _prepared(task, service, scope, receive)
    except asyncio.CancelledError:  # the server, which is ending, waits no longer
        raise AnswerError.of(NoNodeError(STOPPING)) from None


async def _prepared(task: Task, service: Frontend, scope: Scope, receive: Receive) -> Outcome:
    router = service.config.router
    headers = dict(scope["headers"])
    _check_content_type(headers)
    with BodyShare(service.body_memory) as share:
        job = Job(
            task=task,
            gzipped=_is_gzipped(headers),
            body=await read_body(headers, receive, router.max_body_bytes, share),
            max_body_bytes=router.max_body_bytes,
            max_model_len=service.max_model_len,
            max_requests=router.max_queued_requests,
        )
        outcome = service.preparer.prepare_now(job)
        return await _in_worker(service, job, scope, receive) if outcome is None else outcome


def _check_content_type(headers: dict[bytes, bytes]) -> None:
    """Raise AnswerError (415) if the body is said to be something else than JSON, as forms of web pages are."""
    given = headers.get(b"content-type", b"application/json")
    media_type = given.partition(b";")[0].strip().lower()
    if media_type == b"application/json" or (media_type.startswith(b"application/") and media_type.endswith(b"+json")):
        return
    message = f"Content-Type: should be 'application/json', not {given[:80].decode('latin-1')!r}"
    error = ErrorInfo(code="unsupported_media_type", message=message, http_status=415)
    raise AnswerError(error, param="Content-Type")


def _is_gzipped(headers: dict[bytes, bytes]) -> bool:
    """Return whether the body is gzip. Raises AnswerError (415) for other encodings."""
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding in (b"gzip", b"x-gzip"):
        return True
    if encoding in (b"identity", b""):
        return False
    message = f"Content-Encoding: {encoding[:40].decode('latin-1')!r} is not supported, only gzip is"
    error = ErrorInfo(code="unsupported_content_encoding", message=message, http_status=415)
    raise AnswerError(error, param="Content-Encoding")


async def read_body(headers: dict[bytes, bytes], receive: Receive, max_body_bytes: int, share: BodyShare) -> bytes:
    """Return the request's body.

    Raises AnswerError if it is, or is said to be, longer than ``max_body_bytes`` (413), or than ``share`` can be (503),
    ClientLeftError if it never comes to its end.
    """
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced[:20]) > max_body_bytes:
        raise too_large(max_body_bytes)
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_body_bytes:
            raise too_large(max_body_bytes)
        share.grow_to(len(body))
    return bytes(body)


async def _in_worker(service: Frontend, job: Job, scope: Scope, receive: Receive) -> Outcome:
    """Let a worker prepare ``job`` while the client is connected."""
    task = asyncio.current_task()
    assert task is not None
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        task.cancel()

    try:
        async with Watching(scope, receive, leave):
            return await service.preparer.prepare_in_worker(job)
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
        raise ClientLeftError from None
