"""The endpoints that generate text."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from kvrelay.core.errors import InvalidRequestError, KVRelayError
from kvrelay.core.messages.base import ErrorInfo
from router.events import NewRequest
from router.http.access_log import note_tokens
from router.http.asgi import Headers, json_object, read_body, send_error, send_events, send_json, watching
from router.metrics import Metrics
from router.openai.answer import Answer, AnswerHead, Style
from router.openai.choice import Choice
from router.openai.errors import AnswerError
from router.openai.generation import ClientLeftError, Generation
from router.openai.models import model_name
from router.openai.sampling import sampling_params, text_options
from router.openai.schemas import GenerationFields, parse
from router.service import RouterService

LONG_BODY_BYTES = 16 << 10
"""Prompts from bodies longer than this are tokenized in a thread, so that they hold up nobody's stream."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger(__name__)


class Api(Protocol):
    """What one of OpenAI's APIs needs beyond the common: ``completions`` or ``chat``."""

    name: str
    id_prefix: str

    @property
    def schema(self) -> type[GenerationFields]:
        """The form of its requests."""

    def prompts(self, request: Any) -> list[list[int]]:
        """Return the token ids of each prompt."""

    def style(self, request: Any, choices: Sequence[Choice]) -> Style:
        """Return what writes the answer."""


class GenerateEndpoint:
    """One API as an ASGI application: a request comes in, one answer, stream or error goes out."""

    def __init__(
        self,
        api: Api,
        service: RouterService,
        metrics: Metrics,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self._api = api
        self._service = service
        self._metrics = metrics
        self._draw_seed = draw_seed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers: Headers = []
        try:
            answer_id, headers = self._identify(scope)
            await self._serve(answer_id, scope, receive, send, headers)
        except ClientLeftError:
            return
        except AnswerError as error:
            self._metrics.refused(self._api.name, error.error.code)
            await send_error(send, error, headers)
        except KVRelayError as error:
            self._metrics.refused(self._api.name, error.code)
            await send_error(send, AnswerError.of(error), headers)
        except Exception:
            logger.exception("broken while serving %s", scope["path"])
            message = "the router made a mistake; its log says more"
            await send_error(send, AnswerError(ErrorInfo(code="internal_error", message=message)), headers)

    def _identify(self, scope: Scope) -> tuple[str, Headers]:
        """Return the answer's id, made of the client's ``X-Request-Id`` if there is one, and the headers to send."""
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        if given and not _REQUEST_ID.fullmatch(given):
            raise InvalidRequestError(
                "X-Request-Id: should be 1 to 128 letters, digits or any of . _ : -", param="X-Request-Id"
            )
        name = given or uuid.uuid4().hex
        return self._api.id_prefix + name, [(b"x-request-id", name.encode())]

    async def _serve(self, answer_id: str, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        arrival_s = self._service.clock.now()
        body = await read_body(receive, self._service.config.router.max_body_bytes)
        request = parse(self._api.schema, json_object(body))
        model = model_name(request.model, self._service.model)
        if len(body) > LONG_BODY_BYTES:
            prompts = await asyncio.to_thread(self._api.prompts, request)
        else:
            prompts = self._api.prompts(request)
        choices = self._choices(answer_id, request, prompts)
        head = AnswerHead(answer_id, int(arrival_s), model)
        answer = Answer(head, self._api.style(request, choices), choices, request)
        generation = Generation(choices, self._service, self._metrics.observer(self._api.name, arrival_s))
        generation.start()
        try:
            async with watching(receive, generation.client_left):
                if request.stream:
                    await send_events(send, answer.events(generation.deltas()), headers)
                else:
                    await send_json(send, await answer.full(generation.deltas()), headers=headers)
        finally:
            generation.close()
            note_tokens(scope, choices)

    def _choices(self, answer_id: str, request: GenerationFields, prompts: list[list[int]]) -> list[Choice]:
        """Return one choice per prompt and ``n``, in this order."""
        count, limit = len(prompts) * request.num_choices, self._service.config.router.max_queued_requests
        if count > limit:
            raise InvalidRequestError(
                f"n: {len(prompts)} prompts with n = {request.num_choices} are {count} requests; the limit is {limit}",
                param="n",
            )
        seed = self._draw_seed() if request.seed is None else request.seed
        return [
            self._choice(answer_id if count == 1 else f"{answer_id}-{index}", index, request, prompts, seed)
            for index in range(count)
        ]

    def _choice(
        self, request_id: str, index: int, request: GenerationFields, prompts: list[list[int]], seed: int
    ) -> Choice:
        prompt_index, which = divmod(index, request.num_choices)
        prompt = prompts[prompt_index]
        sampling = sampling_params(
            request,
            self._service.model,
            num_prompt_tokens=len(prompt),
            max_model_len=self._service.max_model_len,
            seed=seed + which,
        )
        new = NewRequest(request_id, prompt, sampling, request.priority or 0)
        return Choice(index, prompt_index, new, self._service.model.tokenizer.token_bytes, text_options(request))
