"""The Messages API: requests and answers of its own, on the path of chat completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from router.anthropic import schemas
from router.anthropic.writer import MessageWriter
from router.openai.answer import AnswerHead, Writer
from router.openai.chat import ChatCompletions
from router.openai.choice import Choice
from router.openai.dialect import Reading
from router.openai.sampling import check_num_messages
from router.openai.schemas import ChatCompletionRequest
from router.openai.tokens import num_chat_tokens


class Messages(ChatCompletions):
    """The request and answer style of messages."""

    name = "messages"
    id_prefix = "msg_"

    def read(self, body: dict[str, Any], max_model_len: int) -> Reading:
        check_num_messages(body.get("messages"), max_model_len)
        return schemas.read(body)

    def writer(
        self,
        head: AnswerHead,
        request: ChatCompletionRequest,
        choices: Sequence[Choice],
        texts: Sequence[str] | None,
        echo: bytes,
    ) -> Writer:
        [choice] = choices
        return MessageWriter(head, choice)

    def prompt_tokens(
        self, body: dict[str, Any], max_model_len: int, check: Callable[[object], None]
    ) -> dict[str, object]:
        """Return the answer to ``/v1/messages/count_tokens``; ``check`` may raise when the request has been read."""
        check_num_messages(body.get("messages"), max_model_len)
        num_tokens = num_chat_tokens(schemas.read_prompt(body), self._model, check)
        return {"input_tokens": num_tokens}
