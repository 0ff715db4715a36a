"""Endpoints of OpenAI, Anthropic, vLLM and SGLang that this server does not have: refused with the reason.

The status is 404, which clients report at once. They retry what is answered with 501.
"""

from __future__ import annotations

from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvrelay.protocol.messages.base import ErrorInfo
from router.http.error_format import error_body
from router.openai.errors import AnswerError

NAME = "unsupported"
"""Name of the routes."""

_EMBEDDINGS = "the served model generates text: there are no embeddings, scores or classes"
_STORED = "answers are not stored"
_FILES = "files are not supported"
_BATCHES = "batches are not supported: send the requests one by one"
_TRAINING = "models are not trained or changed here"
_MODERATIONS = "moderations are not supported"
_ONLY_TEXT = "only text is supported: no audio, images or video"
_ADAPTERS = "LoRA adapters are not supported"
_AGENTS = "assistants, threads, conversations and their tools are not supported: send the whole conversation"

_OPERATORS = "this is for operators, at their address: router.admin_host and router.admin_port"

_ANY = ("GET", "POST", "DELETE")

UNSUPPORTED: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("/v1/embeddings", "/v1/score", "/v1/rerank", "/v2/rerank"), (_EMBEDDINGS, ("POST",))),
    **dict.fromkeys(("/score", "/rerank", "/pooling", "/classify"), (_EMBEDDINGS, ("POST",))),
    "/v1/chat/completions": (_STORED, ("GET",)),
    "/v1/chat/completions/{rest:path}": (_STORED, _ANY),
    "/v1/responses/{rest:path}": (_STORED, _ANY),
    "/v1/messages/batches{rest:path}": (_BATCHES, _ANY),
    "/v1/models/{rest:path}": (_TRAINING, ("DELETE",)),
    "/v1/files{rest:path}": (_FILES, _ANY),
    "/v1/uploads{rest:path}": (_FILES, _ANY),
    "/v1/batches{rest:path}": (_BATCHES, _ANY),
    "/v1/fine_tuning/{rest:path}": (_TRAINING, _ANY),
    "/v1/moderations": (_MODERATIONS, ("POST",)),
    "/v1/audio/{rest:path}": (_ONLY_TEXT, _ANY),
    "/v1/images/{rest:path}": (_ONLY_TEXT, _ANY),
    "/v1/videos{rest:path}": (_ONLY_TEXT, _ANY),
    "/v1/realtime{rest:path}": (_ONLY_TEXT, _ANY),
    "/v1/load_lora_adapter": (_ADAPTERS, ("POST",)),
    "/v1/unload_lora_adapter": (_ADAPTERS, ("POST",)),
    "/v1/assistants{rest:path}": (_AGENTS, _ANY),
    "/v1/threads{rest:path}": (_AGENTS, _ANY),
    "/v1/conversations{rest:path}": (_AGENTS, _ANY),
    "/v1/containers{rest:path}": (_AGENTS, _ANY),
    "/v1/vector_stores{rest:path}": (_AGENTS, _ANY),
    "/v1/evals{rest:path}": (_TRAINING, _ANY),
    "/server_info": (_OPERATORS, ("GET",)),
    "/get_server_info": (_OPERATORS, ("GET",)),
    "/reset_prefix_cache": (_OPERATORS, ("POST",)),
    "/flush_cache": (_OPERATORS, ("GET", "POST")),
}
"""Paths, and for each the reason and the methods that are refused with it."""


def unsupported_routes() -> Iterator[Route]:
    """Yield the routes of all of ``UNSUPPORTED``. They belong behind those of the endpoints that there are."""
    for path, (reason, methods) in UNSUPPORTED.items():
        yield Route(path, _Refusal(reason).answer, methods=list(methods), name=NAME)


class _Refusal:
    """The answer to every request for one path."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def answer(self, request: Request) -> Response:
        """Refuse ``request``, whatever its body is."""
        message = f"{request.method} {request.url.path[:200]}: {self._reason}"
        error = AnswerError(ErrorInfo(code="unsupported_endpoint", message=message, http_status=404))
        return JSONResponse(error_body(error, request.url.path), error.status)
