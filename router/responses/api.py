"""The Responses API: requests and answers of its own, on the path of chat completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from router.openai.answer import AnswerHead, Writer
from router.openai.chat import ChatCompletions
from router.openai.choice import Choice
from router.openai.dialect import Reading, refuse
from router.openai.sampling import check_num_messages
from router.openai.schemas import ChatCompletionRequest
from router.openai.tokens import num_chat_tokens
from router.responses import schemas
from router.responses.truncation import prompt_that_fits
from router.responses.writer import ResponseWriter


class Responses(ChatCompletions):
    """The request and answer style of responses."""

    name = "responses"
    id_prefix = "resp_"

    def read(self, body: dict[str, Any], max_model_len: int) -> Reading:
        check_num_messages(body.get("input"), max_model_len, "input")
        reading = schemas.read(body, self._model)
        request = reading.request
        assert isinstance(request, ChatCompletionRequest)
        if request.logprobs and self.parsing(request) is not None:
            refuse("include", "there are no logprobs where reasoning or tool calls are found in the output")
        return reading

    def token_ids(self, request: ChatCompletionRequest, max_model_len: int) -> list[int]:
        if request.truncate_prompt_tokens is None:
            return super().token_ids(request, max_model_len)
        return prompt_that_fits(request, self._model, max_model_len)

    def writer(
        self,
        head: AnswerHead,
        request: ChatCompletionRequest,
        choices: Sequence[Choice],
        texts: Sequence[str] | None,
        echo: bytes,
    ) -> Writer:
        [choice] = choices
        token_bytes = self._model.tokenizer.token_bytes
        return ResponseWriter(head, choice, echo, token_bytes, with_logprobs=bool(request.logprobs))

    def prompt_tokens(
        self, body: dict[str, Any], max_model_len: int, check: Callable[[object], None]
    ) -> dict[str, object]:
        """Return the answer to ``/v1/responses/input_tokens``; ``check`` may raise when the request has been read."""
        check_num_messages(body.get("input"), max_model_len, "input")
        num_tokens = num_chat_tokens(schemas.read_prompt(body), self._model, check)
        return {"object": "response.input_tokens", "input_tokens": num_tokens}
