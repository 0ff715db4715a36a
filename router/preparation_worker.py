"""Worker process that prepares long bodies for the router, one at a time, until its standard input ends."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec
import setproctitle

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import KVRelayError
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.runtime.parent import end_with_parent
from router.model import load_model
from router.openai import schemas
from router.openai.errors import AnswerError
from router.preparation import Job, Preparation, PreparedRequest
from router.preparation_wire import LENGTH, Answer, Generate, Refusal, Reply, decode_job, encode, framed

NICENESS = 5
"""Streams and model steps have priority when cores are short."""

_MEMORY_BYTES, _MEMORY_PER_BODY_BYTE = 4 << 30, 256
"""Address space limit of a worker: a constant plus a multiple of ``max_body_bytes``. Beyond it the job fails."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Serve the parent process. The parent ends it by closing its input, so SIGINT and SIGTERM are ignored."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    setproctitle.setproctitle("kvrelay router preparation")
    os.nice(NICENESS)
    source, target = sys.stdin.buffer, _claim_stdout()
    settings = _read(source)
    if settings is None:
        return
    schemas.unknown_fields.collect()
    preparation = Preparation(load_model(ClusterConfig.model_validate_json(settings)))
    while (message := _read(source)) is not None:
        job = decode_job(message)
        del message
        _limit_memory(job.max_body_bytes)
        target.write(framed(encode(reply_to(preparation, job))))
        target.flush()


def _claim_stdout() -> BinaryIO:
    """Return standard output, used only for messages; redirect other prints to standard error."""
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return target


def _read(source: BinaryIO) -> bytes | None:
    """Return the next message, or None at the end of the input."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    message = source.read(length)
    return message if len(message) == length else None


def _limit_memory(max_body_bytes: int) -> None:
    limit = _MEMORY_BYTES + _MEMORY_PER_BODY_BYTE * max_body_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def reply_to(preparation: Preparation, job: Job) -> Reply:
    """Return the reply to ``job``; any exception becomes a Refusal."""
    return Reply(_outcome(preparation, job), schemas.unknown_fields.take())


def _outcome(preparation: Preparation, job: Job) -> Generate | Answer | Refusal:
    try:
        outcome = preparation.prepare(job)
        if isinstance(outcome, bytes):
            return Answer(outcome)
        return _generate(preparation.without_content(job, outcome))
    except AnswerError as error:
        return Refusal(error.error, error.param)
    except KVRelayError as error:
        return Refusal(ErrorInfo.of(error), error.param)
    except Exception:  # process boundary: reported as internal_error
        logger.exception("broken while preparing a body for %s", job.task)
        return Refusal(ErrorInfo(code="internal_error", message="internal error, see the router's log"), None)


def _generate(prepared: PreparedRequest) -> Generate:
    prompts = [msgspec.Raw(encode(prompt)) for prompt in prepared.prompts]
    texts = None if prepared.texts is None else list(prepared.texts)
    request = prepared.request.model_dump_json(exclude_unset=True).encode()
    return Generate(request, prompts, texts, prepared.structure, prepared.echo, prepared.rules)


if __name__ == "__main__":
    main()
