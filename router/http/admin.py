"""Endpoints other than generation: models, tokens, health, state of the cluster."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import kvrelay
from kvrelay.errors import KVRelayError, ModelNotFoundError
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.phases import Phase, phases
from router.cluster_status import cluster_status
from router.http.asgi import send_body, send_error, send_internal_error
from router.http.body import prepared
from router.openai.errors import AnswerError
from router.openai.field_types import shown
from router.openai.generation import ClientLeftError
from router.openai.models import model_card, model_cards, model_name
from router.openai.tokenizer_info import tokenizer_info
from router.preparation import Task
from router.service import RouterService


class AdminEndpoints:
    """Endpoints that are answered immediately and change nothing."""

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._started_s = service.clock.now()

    # ------------------------------------------------------------ models

    async def models(self, _: Request) -> Response:
        """``GET /v1/models``: the model under each of its names."""
        return JSONResponse({"object": "list", "data": model_cards(self._service.model, **self._card_facts())})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``: the model under one name, which may have slashes."""
        try:
            name = model_name(request.path_params["model_id"], self._service.model)
        except ModelNotFoundError as error:
            return _error_response(AnswerError.of(error))
        return JSONResponse(model_card(name, self._service.model, **self._card_facts()))

    def _card_facts(self) -> dict[str, int]:
        return {"created_s": int(self._started_s), "max_model_len": self._service.max_model_len}

    async def tokenizer_info(self, _: Request) -> Response:
        """``GET /tokenizer_info``: the checkpoint's tokenizer config and the chat template in use."""
        return JSONResponse(tokenizer_info(self._service.model))

    # ------------------------------------------------------------ state

    async def health(self, _: Request) -> Response:
        """``GET /health``: this process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """``GET /ready``: 200 if a request would be served now, else 503 with the reason."""
        reason = self._service.machine.unready_reason()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return _error_response(AnswerError(ErrorInfo(code="not_ready", message=reason, http_status=503)))

    async def version(self, _: Request) -> Response:
        """``GET /version``: kvrelay's version."""
        return JSONResponse({"version": kvrelay.__version__})

    async def load(self, _: Request) -> Response:
        """``GET /load``: how many requests are in progress, as in vLLM; each choice of an answer counts."""
        return JSONResponse({"server_load": len(self._service.machine.requests)})

    async def cluster(self, _: Request) -> Response:
        """``GET /cluster``: nodes with their load, requests by status, counters."""
        return JSONResponse(cluster_status(self._service, for_operators=False))

    async def timeline(self, request: Request) -> Response:
        """``GET /cluster/requests/{request_id}``: timeline of a request in progress or recently ended."""
        request_id = RequestId(request.path_params["request_id"])
        timeline = self._service.machine.requests.timelines.get(request_id)
        if timeline is None:
            message = f"no request {shown(request_id)} is in progress or among the last that ended"
            return _error_response(AnswerError(ErrorInfo(code="not_found", message=message, http_status=404)))
        return JSONResponse({**timeline, "phases": [_phase(phase) for phase in phases(timeline)]})


class TokenEndpoint:
    """``POST /tokenize``, ``/detokenize``, or an endpoint that counts the tokens of a prompt."""

    def __init__(self, task: Task, service: RouterService) -> None:
        self._task = task
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            answer = await prepared(self._task, self._service, scope, receive)
            assert isinstance(answer, bytes)
            await send_body(send, answer)
        except ClientLeftError:
            return
        except AnswerError as error:
            await send_error(send, error, path=scope["path"])
        except KVRelayError as error:
            await send_error(send, AnswerError.of(error), path=scope["path"])
        except Exception:
            await send_internal_error(send, scope["path"])


def _phase(phase: Phase) -> dict[str, object]:
    return {"name": phase.name, "node": phase.node, "start_s": phase.start_s, "duration_s": phase.duration_s}


def _error_response(error: AnswerError) -> Response:
    return JSONResponse(error.body, error.status)
