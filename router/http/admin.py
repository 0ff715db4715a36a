"""Endpoints other than generation that need no machine: models, tokens, health."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import kvrelay
from kvrelay.errors import KVRelayError, ModelNotFoundError
from router.frontend import Frontend
from router.http.asgi import send_body, send_error, send_internal_error
from router.http.body import prepared
from router.openai.errors import AnswerError
from router.openai.generation import ClientLeftError
from router.openai.models import model_card, model_cards, model_name
from router.openai.tokenizer_info import tokenizer_info
from router.preparation import Task


class AdminEndpoints:
    """Endpoints that are answered immediately and change nothing."""

    def __init__(self, service: Frontend) -> None:
        self._service = service

    # ------------------------------------------------------------ models

    async def models(self, _: Request) -> Response:
        """``GET /v1/models``: the model under each of its names."""
        return JSONResponse({"object": "list", "data": model_cards(self._service.model, **self._card_facts())})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``: the model under one name, which may have slashes."""
        try:
            name = model_name(request.path_params["model_id"], self._service.model)
        except ModelNotFoundError as error:
            return error_response(AnswerError.of(error))
        return JSONResponse(model_card(name, self._service.model, **self._card_facts()))

    def _card_facts(self) -> dict[str, int]:
        return {"created_s": int(self._service.started_s), "max_model_len": self._service.max_model_len}

    async def tokenizer_info(self, _: Request) -> Response:
        """``GET /tokenizer_info``: the checkpoint's tokenizer config and the chat template in use."""
        return JSONResponse(tokenizer_info(self._service.model))

    # ------------------------------------------------------------ the process

    async def health(self, _: Request) -> Response:
        """``GET /health``: this process is alive."""
        return JSONResponse({"status": "ok"})

    async def version(self, _: Request) -> Response:
        """``GET /version``: kvrelay's version."""
        return JSONResponse({"version": kvrelay.__version__})


class TokenEndpoint:
    """``POST /tokenize``, ``/detokenize``, or an endpoint that counts the tokens of a prompt."""

    def __init__(self, task: Task, service: Frontend) -> None:
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


def error_response(error: AnswerError) -> Response:
    """Return ``error`` as a response."""
    return JSONResponse(error.body, error.status)
