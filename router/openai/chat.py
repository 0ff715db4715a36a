"""``/v1/chat/completions``: messages, rendered by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kvrelay.tokenizer.token_bytes import TokenBytes
from router.model import ServedModel
from router.openai.answer import Answer, AnswerHead, Writer
from router.openai.choice import Choice, Delta
from router.openai.dialect import Reading
from router.openai.logprobs import Logprobs, chat_logprobs
from router.openai.reading import reading
from router.openai.sampling import check_num_messages, check_text_ids, check_text_length
from router.openai.schemas import ChatCompletionRequest, ChatFields, ChatMessage, parse

ROLE = "assistant"


def chat_prompt(fields: ChatFields, model: ServedModel, max_model_len: int | None = None) -> list[int]:
    """Return the token ids of a chat.

    Raises InvalidRequestError if the template refuses it, PromptTooLongError if it is certainly longer than
    ``max_model_len`` tokens.
    """
    with reading("messages: the chat template cannot render them", "messages"):
        text = model.tokenizer.render_chat(
            [dict(message) for message in fields.messages],
            add_generation_prompt=fields.add_generation_prompt is not False and not fields.continue_final_message,
            continue_final_message=bool(fields.continue_final_message),
            variables=fields.chat_template_kwargs,
        )
    if max_model_len is not None:
        check_text_length(text, model, max_model_len, "messages")
    # The template has put the special tokens there already.
    return model.tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens))


class ChatCompletions:
    """The request and answer style of chat completions."""

    name = "chat"
    id_prefix = "chatcmpl-"
    schema = ChatCompletionRequest
    without_content: ClassVar[dict[str, object]] = {
        "messages": [ChatMessage(role="user")],
        "chat_template_kwargs": None,
    }

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def read(self, body: dict[str, Any], max_model_len: int) -> Reading:
        """Return the request that ``body`` is. Raises InvalidRequestError, PromptTooLongError for too many messages."""
        check_num_messages(body.get("messages"), max_model_len)
        return Reading(parse(ChatCompletionRequest, body))

    def num_prompts(self, request: ChatCompletionRequest) -> int:
        """Return 1: a chat is one prompt."""
        return 1

    def prompts(self, request: ChatCompletionRequest, max_model_len: int) -> list[list[int]]:
        """Return the token ids of the one prompt.

        Raises what ``chat_prompt`` raises, and InvalidRequestError if it has tokens that the model does not have.
        """
        token_ids = chat_prompt(request, self._model, max_model_len)
        check_text_ids(token_ids, self._model, "messages")
        return [token_ids]

    def texts(self, request: ChatCompletionRequest) -> None:
        """Return nothing: a chat has no echo."""

    def writer(
        self,
        head: AnswerHead,
        request: ChatCompletionRequest,
        choices: Sequence[Choice],
        texts: Sequence[str] | None,
        echo: bytes,
    ) -> Writer:
        """Return what writes the answer."""
        return Answer(head, ChatStyle(self._model.tokenizer.token_bytes, request), choices, request)


class ChatStyle:
    """The choices of a chat completion: a ``message``, or in a stream a ``delta``; the first has the role."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, token_bytes: TokenBytes, request: ChatCompletionRequest) -> None:
        self._token_bytes = token_bytes
        self._with_logprobs = bool(request.logprobs)
        self._with_token_ids = bool(request.return_token_ids)

    def chunk_choice(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, object]:
        """Return the new text and logprobs if asked for. The role comes with the first token, not before it."""
        content = {"role": ROLE, "content": delta.text} if first else {"content": delta.text}
        return {"delta": content, "logprobs": self.logprobs(choice, delta)}

    def full_choice(self, choice: Choice, text: str) -> dict[str, object]:
        """Return the message."""
        return {"message": {"role": ROLE, "content": text, "refusal": None}}

    def logprobs(self, choice: Choice, delta: Delta) -> Logprobs | None:
        """Return the logprobs of the new tokens if asked for."""
        return chat_logprobs(self._token_bytes, delta.token_ids, delta.logprobs) if self._with_logprobs else None

    def prompt_fields(self, choices: Sequence[Choice]) -> dict[str, object]:
        """Return the prompt's token ids if the client wants token ids."""
        return {"prompt_token_ids": choices[0].request.prompt_token_ids} if self._with_token_ids else {}
