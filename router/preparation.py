"""From the body of an HTTP request to prompts of token ids: everything whose cost grows with the body.

The same code runs in two places. Short bodies are prepared on the event loop, since a hop to another process would cost
more than the work; all others in a worker process (``preparation_pool``), where they hold up no stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import msgspec

from kvrelay.errors import InvalidRequestError, PromptTooLongError
from kvrelay.protocol.messages.base import ErrorInfo
from router.model import ServedModel
from router.openai.answer import Style
from router.openai.chat import ChatCompletions
from router.openai.choice import Choice
from router.openai.completions import Completions
from router.openai.errors import AnswerError
from router.openai.models import model_name
from router.openai.sampling import RequestSampling, too_long
from router.openai.schemas import ChatFields, GenerationFields, parse
from router.openai.tokens import detokenized, tokenized

INLINE_BYTES = 16 << 10
"""Bodies up to this length may be prepared on the event loop: some milliseconds at most."""

INLINE_MESSAGES = 64
"""Chats with more messages are rendered in a worker: a template may take time that grows with their square."""

Task: TypeAlias = Literal["completions", "chat", "tokenize", "detokenize"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One body, what it is for, and the limits it must keep.

    ``max_body_bytes`` holds for the body once decompressed. ``max_requests``: prompts times ``n``.
    """

    task: Task
    body: bytes
    gzipped: bool = False
    max_body_bytes: int
    max_model_len: int
    max_requests: int


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that generates. From a worker ``request`` comes without its content, which is in the prompts.

    ``texts``: each prompt as text, if the client wants an echo.
    """

    request: GenerationFields
    prompts: Sequence[list[int]]
    texts: Sequence[str] | None = None


class Api(Protocol):
    """What one of OpenAI's APIs needs beyond the common: ``completions`` or ``chat``.

    ``without_content``: what to put in place of a request's prompt or messages once they have been read.
    """

    name: str
    id_prefix: str
    without_content: ClassVar[dict[str, object]]

    @property
    def schema(self) -> type[GenerationFields]:
        """The form of its requests."""

    def num_prompts(self, request: Any) -> int:
        """Return how many prompts there are."""

    def prompts(self, request: Any, max_model_len: int) -> list[list[int]]:
        """Return the token ids of each prompt."""

    def texts(self, request: Any) -> list[str] | None:
        """Return each prompt as text if the client wants an echo."""

    def style(self, request: Any, choices: Sequence[Choice], texts: Sequence[str] | None) -> Style:
        """Return what writes the answer."""


Outcome: TypeAlias = PreparedRequest | bytes
"""A request that generates, or the JSON of an answer that is complete already."""


class TooLongForLoopError(Exception):
    """Preparing this body takes more work than the event loop may do at a time."""


class Preparation:
    """Prepares bodies for one model."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.apis: dict[str, Api] = {"completions": Completions(model), "chat": ChatCompletions(model)}

    def prepare_inline(self, job: Job) -> Outcome:
        """Prepare a short body. Raises TooLongForLoopError if it is not short, and what ``prepare`` raises."""
        if len(job.body) > INLINE_BYTES:
            raise TooLongForLoopError
        return self._prepare(job, _inflate_inline, _check_inline)

    def prepare(self, job: Job) -> Outcome:
        """Prepare any body.

        Raises InvalidRequestError, ModelNotFoundError or PromptTooLongError if it cannot be served, AnswerError (413)
        if it is too long once decompressed.
        """
        return self._prepare(job, inflate, _accept)

    def _prepare(self, job: Job, inflate: Callable[[bytes, int], bytes], check: Callable[[object], None]) -> Outcome:
        body = inflate(job.body, job.max_body_bytes) if job.gzipped else job.body
        content = json_object(body)
        match job.task:
            case "tokenize":
                return msgspec.json.encode(tokenized(content, self._model, job.max_model_len, check))
            case "detokenize":
                return msgspec.json.encode(detokenized(content, self._model))
            case "completions" | "chat":
                return self._generation(job, content, check)

    def _generation(self, job: Job, content: dict[str, Any], check: Callable[[object], None]) -> PreparedRequest:
        api = self.apis[job.task]
        _check_num_messages(content.get("messages"), job.max_model_len)
        request = parse(api.schema, content)
        model_name(request.model, self._model)
        check(request)
        _check_count(api.num_prompts(request), request.num_choices, job.max_requests)
        prompts = api.prompts(request, job.max_model_len)
        return PreparedRequest(request, prompts, api.texts(request))

    def without_content(self, job: Job, prepared: PreparedRequest) -> PreparedRequest:
        """Return what the router needs of a long request: its own prompt and messages would be sent in vain.

        Raises what the router would raise for these prompts, so that those it refuses need not be sent either.
        """
        sampling = RequestSampling(prepared.request, self._model, job.max_model_len)
        for prompt in prepared.prompts:
            sampling.of(len(prompt))
        request = prepared.request.model_copy(update=self.apis[job.task].without_content)
        return PreparedRequest(request, prepared.prompts, prepared.texts)


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``. Raises InvalidRequestError if there is none."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("the body should be a JSON object")
    return content


def inflate(body: bytes, max_body_bytes: int) -> bytes:
    """Return what gzip made ``body`` of, without ever holding more than ``max_body_bytes`` of it.

    Raises AnswerError (413) if there is more, InvalidRequestError if it is not one whole gzip member.
    """
    decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        content = decompressor.decompress(body, max_body_bytes + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the body is not gzip: {error}") from error
    if len(content) > max_body_bytes:
        raise too_large(max_body_bytes)
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidRequestError("the body is not one whole gzip member")
    return content


def too_large(max_body_bytes: int) -> AnswerError:
    """Return the answer to a body longer than that."""
    reason = f"the body is longer than {max_body_bytes} bytes (router.max_body_bytes)"
    return AnswerError(ErrorInfo(code="request_too_large", message=reason, http_status=413))


def _inflate_inline(body: bytes, max_body_bytes: int) -> bytes:
    try:
        return inflate(body, min(INLINE_BYTES, max_body_bytes))
    except AnswerError:
        raise TooLongForLoopError from None


def _check_inline(request: object) -> None:
    if isinstance(request, ChatFields) and not _renders_fast(request):
        raise TooLongForLoopError


def _renders_fast(chat: ChatFields) -> bool:
    """Tell whether the template has little to do: few messages, and no variables to compute with."""
    variables = (chat.chat_template_kwargs or {}).values()
    return len(chat.messages) <= INLINE_MESSAGES and all(isinstance(value, bool | str | None) for value in variables)


def _accept(request: object) -> None:
    """Let any request through: a worker has time."""


def _check_num_messages(messages: object, max_model_len: int) -> None:
    """Refuse a chat with more messages than tokens fit before anything is done for each of them."""
    if isinstance(messages, list) and len(messages) > max_model_len:
        raise PromptTooLongError(too_long(len(messages), 1, max_model_len, "messages", at_least=True), param="messages")


def _check_count(num_prompts: int, num_choices: int, limit: int) -> None:
    count = num_prompts * num_choices
    if count > limit:
        raise InvalidRequestError(
            f"n: {num_prompts} prompts with n = {num_choices} are {count} requests; the limit is {limit}", param="n"
        )
