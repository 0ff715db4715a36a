"""Converts the body of an HTTP request to prompts of token ids: all steps whose cost grows with the body.

Short bodies are prepared on the event loop, because a round trip to another process would cost more than the work. All
others, and those with a grammar that was never compiled, are prepared in a worker process (``preparation_pool``), where
they do not delay streams.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import msgspec
from msgspec.structs import replace

from kvrelay.errors import InvalidRequestError
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.token_rules import TokenRules
from router.anthropic.api import Messages
from router.known_grammars import KnownGrammars
from router.model import ServedModel
from router.openai.answer import AnswerHead, Writer
from router.openai.chat import ChatCompletions
from router.openai.choice import Choice
from router.openai.completions import Completions
from router.openai.dialect import Reading
from router.openai.errors import AnswerError
from router.openai.models import model_name
from router.openai.parsing import Parsing
from router.openai.sampling import RequestSampling
from router.openai.schemas import ChatFields, GenerationFields
from router.openai.structured import Structure
from router.openai.token_rules import token_rules_of
from router.openai.tokens import detokenized, tokenized
from router.responses.api import Responses

INLINE_BYTES = 16 << 10
"""Bodies up to this length may be prepared on the event loop: some milliseconds at most."""

INLINE_MESSAGES = 64
"""Chats with more messages are rendered in a worker: rendering may take time quadratic in their number."""

INLINE_BAD_WORDS = 64
"""More are tokenized in a worker: each takes some tens of microseconds."""

Task: TypeAlias = Literal[
    "completions", "chat", "responses", "messages", "tokenize", "detokenize", "responses_tokens", "messages_tokens"
]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One body to prepare, its task and its limits.

    ``max_body_bytes`` limits the decompressed body. ``max_requests`` limits prompts times ``n``.
    """

    task: Task
    body: bytes
    gzipped: bool = False
    max_body_bytes: int
    max_model_len: int
    max_requests: int


class PreparedRequest(msgspec.Struct, frozen=True):
    """A generation request. From a worker, ``request`` comes without its prompt or messages.

    ``texts``: each prompt as text, if the client requested an echo. ``structure``: what the outputs must be.
    ``echo``: what else the answer repeats of the body. ``rules``: what tokens the outputs may have.
    """

    request: GenerationFields
    prompts: Sequence[list[int]]
    texts: Sequence[str] | None = None
    structure: Structure | None = None
    echo: bytes = b""
    rules: TokenRules | None = None


class Api(Protocol):
    """The parts specific to one API. What they read is the same kind of request: that of completions or of chats."""

    name: str
    id_prefix: str

    @property
    def schema(self) -> type[GenerationFields]:
        """The schema of its requests."""

    def read(self, body: dict[str, Any], max_model_len: int) -> Reading:
        """Return the request that ``body`` is. Raises InvalidRequestError, and PromptTooLongError if it is certain."""

    def num_prompts(self, request: Any) -> int:
        """Return the number of prompts."""

    def prompts(self, request: Any, max_model_len: int) -> list[list[int]]:
        """Return the token ids of each prompt."""

    def texts(self, request: Any) -> list[str] | None:
        """Return each prompt as text if the client requested an echo, else None."""

    def writer(
        self, head: AnswerHead, request: Any, choices: Sequence[Choice], texts: Sequence[str] | None, echo: bytes
    ) -> Writer:
        """Return what writes the answer."""

    def without_content(self, request: Any) -> GenerationFields:
        """Return ``request`` without what is long and not needed after tokenization."""

    def parsing(self, request: Any) -> Parsing | None:
        """Return how the outputs are parsed; None: all of them is text."""

    def structure(self, request: Any, prompts: Sequence[list[int]]) -> Structure | None:
        """Return what the outputs must be, if not any text. Raises InvalidRequestError."""


Outcome: TypeAlias = PreparedRequest | bytes
"""A generation request, or the JSON of a complete response."""


class TooLongForLoopError(Exception):
    """Preparing this body would block the event loop for too long."""


class Preparation:
    """Prepares bodies for one model."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.known_grammars = KnownGrammars()
        self._responses, self._messages = Responses(model), Messages(model)
        self.apis: dict[str, Api] = {
            "completions": Completions(model),
            "chat": ChatCompletions(model),
            "responses": self._responses,
            "messages": self._messages,
        }

    def prepare_inline(self, job: Job) -> Outcome:
        """Prepare a short body. Raises TooLongForLoopError if it is not short, else as ``prepare``."""
        if len(job.body) > INLINE_BYTES:
            raise TooLongForLoopError
        return self._prepare(job, _inflate_inline, _check_inline, self._check_known)

    def prepare(self, job: Job) -> Outcome:
        """Prepare any body.

        Raises InvalidRequestError, ModelNotFoundError or PromptTooLongError if it cannot be served, AnswerError (413)
        if it is too long once decompressed.
        """
        return self._prepare(job, inflate, _accept, self._check_grammar)

    def _prepare(
        self,
        job: Job,
        inflate: Callable[[bytes, int], bytes],
        check: Callable[[object], None],
        check_structure: Callable[[Structure], None],
    ) -> Outcome:
        body = inflate(job.body, job.max_body_bytes) if job.gzipped else job.body
        try:
            return self._outcome(job, json_object(body), check, check_structure)
        except RecursionError as error:
            raise InvalidRequestError("the body has too many objects or lists inside each other") from error

    def _outcome(
        self,
        job: Job,
        content: dict[str, Any],
        check: Callable[[object], None],
        check_structure: Callable[[Structure], None],
    ) -> Outcome:
        match job.task:
            case "tokenize":
                return msgspec.json.encode(tokenized(content, self._model, job.max_model_len, check))
            case "detokenize":
                return msgspec.json.encode(detokenized(content, self._model))
            case "responses_tokens":
                return msgspec.json.encode(self._responses.prompt_tokens(content, job.max_model_len, check))
            case "messages_tokens":
                return msgspec.json.encode(self._messages.prompt_tokens(content, job.max_model_len, check))
            case "completions" | "chat" | "responses" | "messages":
                return self._generation(job, content, check, check_structure)

    def _generation(
        self,
        job: Job,
        content: dict[str, Any],
        check: Callable[[object], None],
        check_structure: Callable[[Structure], None],
    ) -> PreparedRequest:
        api = self.apis[job.task]
        request, echo = api.read(content, job.max_model_len)
        model_name(request.model, self._model)
        check(request)
        _check_count(api.num_prompts(request), request.num_choices, job.max_requests)
        prompts = api.prompts(request, job.max_model_len)
        structure = api.structure(request, prompts)
        if structure is not None:
            check_structure(structure)
        return PreparedRequest(
            request, prompts, api.texts(request), structure, echo, token_rules_of(request, self._model)
        )

    def _check_known(self, structure: Structure) -> None:
        """Raise TooLongForLoopError if the grammar must be compiled to know whether it is valid."""
        if not self.known_grammars.has(structure.grammar):
            raise TooLongForLoopError

    def _check_grammar(self, structure: Structure) -> None:
        """Raise InvalidRequestError if the grammar is invalid. A worker may take long."""
        if self.known_grammars.has(structure.grammar):
            return
        from router.grammar_check import check_structure  # noqa: PLC0415 (loads the grammar library)

        check_structure(structure, self._model)
        self.known_grammars.add(structure.grammar)

    def without_content(self, job: Job, prepared: PreparedRequest) -> PreparedRequest:
        """Return ``prepared`` without prompt, messages and what ``rules`` are made of: the router does not need them.

        Raises the errors the router would raise for these prompts, so that refused prompts are not sent.
        """
        sampling = RequestSampling(prepared.request, self._model, job.max_model_len, prepared.structure, prepared.rules)
        for prompt in prepared.prompts:
            sampling.of(len(prompt))
        request = self.apis[job.task].without_content(prepared.request)
        if prepared.rules is not None:
            request = request.model_copy(update={"allowed_token_ids": None, "bad_words": None})
        return replace(prepared, request=request)


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``. Raises InvalidRequestError if it is not one."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("the body should be a JSON object")
    return content


def inflate(body: bytes, max_body_bytes: int) -> bytes:
    """Return the decompressed ``body``, never holding more than ``max_body_bytes`` + 1 bytes of it.

    Raises AnswerError (413) if it is longer, InvalidRequestError if it is not one whole gzip member.
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
    """Return the error (413) for a body longer than ``max_body_bytes``."""
    reason = f"the body is longer than {max_body_bytes} bytes (router.max_body_bytes)"
    return AnswerError(ErrorInfo(code="request_too_large", message=reason, http_status=413))


def _inflate_inline(body: bytes, max_body_bytes: int) -> bytes:
    try:
        return inflate(body, min(INLINE_BYTES, max_body_bytes))
    except AnswerError:
        raise TooLongForLoopError from None


def _accept(request: object) -> None:
    """Accept what a worker may prepare: anything."""


def _check_inline(request: object) -> None:
    """Raise TooLongForLoopError if rendering ``request``, or tokenizing its bad words, takes long."""
    if isinstance(request, ChatFields) and not _renders_fast(request):
        raise TooLongForLoopError
    if isinstance(request, GenerationFields) and len(request.bad_words or ()) > INLINE_BAD_WORDS:
        raise TooLongForLoopError


def _renders_fast(chat: ChatFields) -> bool:
    """Return whether rendering is fast: few messages, and only bool, str or None variables."""
    variables = (chat.chat_template_kwargs or {}).values()
    return len(chat.messages) <= INLINE_MESSAGES and all(isinstance(value, bool | str | None) for value in variables)


def _check_count(num_prompts: int, num_choices: int, limit: int) -> None:
    count = num_prompts * num_choices
    if count > limit:
        raise InvalidRequestError(
            f"n: {num_prompts} prompts with n = {num_choices} are {count} requests; the limit is {limit}", param="n"
        )
