"""The endpoints that generate text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from starlette.types import Receive, Scope, Send

from kvrelay.errors import InvalidRequestError, KVRelayError
from kvrelay.protocol.ids import RequestId
from router.admission import TTFT_LIMIT_HEADER
from router.client_metrics import ClientMetrics
from router.events import NewRequest
from router.frontend import Frontend
from router.http.access_log import note_tokens
from router.http.asgi import Headers, Watching, send_error, send_events, send_internal_error, send_pieces
from router.http.body import prepared
from router.http.clients_only import charge
from router.http.request_span import note_requests
from router.openai.answer import AnswerHead
from router.openai.choice import Choice
from router.openai.errors import AnswerError
from router.openai.generation import ClientLeftError, Generation
from router.openai.models import model_name
from router.openai.sampling import RequestSampling, text_options
from router.preparation import Api, PreparedRequest, Task
from router.text.output_text import NO_IDS

_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MAX_ECHOED_BYTES = 1024
_MAX_SESSION_BYTES = 256
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_MAX_TTFT_MS = 86_400_000

_random = random.Random()


def _new_seed() -> int:
    return _random.getrandbits(63)


def _new_name() -> str:
    """Return a name that no other answer has."""
    return f"{_random.getrandbits(128):032x}"


def _max_ttft_s(headers: Mapping[bytes, bytes]) -> float | None:
    """Return the longest time to first token that the client accepts, in seconds; None: it has not said.

    Raises InvalidRequestError if the header is no number, or out of bounds.
    """
    given = headers.get(TTFT_LIMIT_HEADER.encode(), b"")
    if not given:
        return None
    text = given.decode("latin-1")
    limit_ms = float(text) if _NUMBER.fullmatch(text) else 0.0
    if not 0 < limit_ms <= _MAX_TTFT_MS:
        raise InvalidRequestError(
            f"{TTFT_LIMIT_HEADER} must be a number of milliseconds above 0 and at most {_MAX_TTFT_MS:,}",
            param=TTFT_LIMIT_HEADER,
        )
    return limit_ms / 1e3


class GenerateEndpoint:
    """One API as an ASGI application: each request gets an answer, a stream or an error."""

    def __init__(
        self,
        task: Task,
        service: Frontend,
        metrics: ClientMetrics,
        draw_seed: Callable[[], int] = _new_seed,
    ) -> None:
        self._task = task
        self._api: Api = service.preparer.apis[task]
        self._service = service
        self._metrics = metrics
        self._draw_seed = draw_seed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        given: bytes = dict(scope["headers"]).get(b"x-request-id", b"")  # the last one if it is repeated
        is_named = _NAME.fullmatch(given.decode("latin-1")) is not None
        name = given.decode("latin-1") if is_named else _new_name()
        headers = [(b"x-request-id", given if 0 < len(given) <= _MAX_ECHOED_BYTES else name.encode())]
        try:
            await self._serve(name, is_named, scope, receive, send, headers)
        except ClientLeftError:
            return
        except AnswerError as error:
            self._metrics.refused(self._api.name, error.error.code)
            await send_error(send, error, headers, scope["path"])
        except KVRelayError as error:
            self._metrics.refused(self._api.name, error.code)
            await send_error(send, AnswerError.of(error), headers, scope["path"])
        except Exception:
            await send_internal_error(send, scope["path"], name, headers)

    async def _serve(
        self, name: str, is_named: bool, scope: Scope, receive: Receive, send: Send, headers: Headers
    ) -> None:
        arrival_s = self._service.clock.now()
        outcome = await prepared(self._task, self._service, scope, receive)
        assert isinstance(outcome, PreparedRequest)
        request = outcome.request
        answer_id, request_ids = await self._ids(name, is_named, len(outcome.prompts) * request.num_choices)
        note_requests(scope, request_ids)
        given: dict[bytes, bytes] = dict(scope["headers"])
        named = given.get(b"x-session-id") or given.get(b"x-session-token", b"")
        session = named[:_MAX_SESSION_BYTES].decode("latin-1")
        max_ttft_s = _max_ttft_s(given)
        choices = list(self._choices(answer_id, request_ids, outcome, session, max_ttft_s))
        head = AnswerHead(answer_id, int(arrival_s), model_name(request.model, self._service.model))
        answer = self._api.writer(head, request, choices, outcome.texts, outcome.echo)
        del outcome  # with the texts of its prompts, which the answer has if it echoes them
        interval = self._service.config.router.stream_interval if request.stream else 1
        observer = self._metrics.observer(self._api.name, arrival_s)
        generation = Generation(choices, self._service, observer, interval=interval)
        generation.start()
        refused = False
        try:
            async with Watching(scope, receive, generation.client_left):
                if request.stream:
                    await send_events(send, answer.events(generation.deltas()), headers)
                else:
                    await send_pieces(send, await answer.full(generation.deltas()), headers)
        except AnswerError:
            refused = not any(choice.num_tokens for choice in choices)
            raise
        finally:
            generation.close()
            note_tokens(scope, choices)
            if not refused:
                charge(scope, choices)

    async def _ids(self, name: str, is_named: bool, count: int) -> tuple[str, Sequence[RequestId]]:
        """Return the answer's id and the ids of its requests, from ``name``.

        A name that the client gave (``is_named``) is not used while a request in progress has it.
        """
        answer_id = self._api.id_prefix + name
        names = [answer_id] if count == 1 else [f"{answer_id}-{index}" for index in range(count)]
        request_ids = [RequestId(name) for name in names]
        if is_named and await self._service.any_in_progress(request_ids):
            return await self._ids(_new_name(), False, count)
        return answer_id, request_ids

    def _choices(
        self,
        answer_id: str,
        request_ids: Sequence[RequestId],
        prepared: PreparedRequest,
        session: str,
        max_ttft_s: float | None,
    ) -> Iterator[Choice]:
        """Yield one choice per prompt and per ``n``, in this order."""
        request, service = prepared.request, self._service
        sampling, parsing = (
            RequestSampling(request, service.model, service.max_model_len, prepared.structure, prepared.rules),
            self._api.parsing(request),
        )
        options = text_options(request, parsing.shown_ids if parsing else NO_IDS)
        first_seed = self._draw_seed() if request.seed is None else request.seed
        for index, request_id in enumerate(request_ids):
            prompt_index, which = divmod(index, request.num_choices)
            prompt = prepared.prompts[prompt_index]
            params = sampling.of(len(prompt), first_seed + which)
            new = NewRequest(request_id, prompt, params, request.priority or 0, session, answer_id, max_ttft_s)
            parser = parsing.parser(prompt) if parsing else None
            yield Choice(index, prompt_index, new, service.model.tokenizer.token_bytes, options, parser)
