"""``/v1/chat/completions``: messages, rendered by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvrelay.tokenizer.token_bytes import TokenBytes
from router.model import ServedModel
from router.openai.answer import Answer, AnswerHead, Writer
from router.openai.choice import Choice, Delta
from router.openai.dialect import Reading
from router.openai.logprobs import Logprobs, chat_logprobs
from router.openai.output_grammar import chat_structure
from router.openai.parsing import Parsing, check_tool_use, parsing_of
from router.openai.prompt_logprobs import PromptLogprobsField
from router.openai.reading import reading
from router.openai.sampling import check_num_messages, check_text_ids, check_text_length, truncated
from router.openai.schemas import ChatCompletionRequest, ChatFields, ChatMessage, parse
from router.openai.structured import Structure
from router.tools.parts import CallArguments, CallBegun, Message, Part, Reasoning, Text, joined

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
            with_tools=bool(fields.rendered_tools),
            variables=_variables(fields),
        )
    if max_model_len is not None:
        check_text_length(text, model, max_model_len, "messages")
    # The template has put the special tokens there already.
    return model.tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens))


def _variables(fields: ChatFields) -> dict[str, Any] | None:
    """Return the variables for the template: what ``chat_template_kwargs`` has goes before other fields."""
    effort, tools, verbosity = fields.reasoning_effort, fields.rendered_tools, fields.verbosity
    if effort is None and verbosity is None and not tools:
        return fields.chat_template_kwargs
    variables: dict[str, Any] = {"tools": tools} if tools else {}
    if verbosity is not None:
        variables["verbosity"] = verbosity
    if effort is not None:
        variables["reasoning_effort"] = effort
    if effort == "none":
        variables |= {"enable_thinking": False, "thinking": False}  # as Qwen's templates call it, and as DeepSeek's do
    return variables | (fields.chat_template_kwargs or {})


class ChatCompletions:
    """The request and answer style of chat completions."""

    name = "chat"
    id_prefix = "chatcmpl-"
    schema = ChatCompletionRequest

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
        check_tool_use(request, self._model)
        token_ids = self.token_ids(request, max_model_len)
        check_text_ids(token_ids, self._model, "messages")
        return [token_ids]

    def token_ids(self, request: ChatCompletionRequest, max_model_len: int) -> list[int]:
        """Return the token ids of the chat, cut as the request asks for. Raises what ``chat_prompt`` raises."""
        token_ids = chat_prompt(request, self._model, None if request.truncate_prompt_tokens else max_model_len)
        return truncated(token_ids, request, max_model_len)

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

    def without_content(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        """Return ``request`` without messages, and with nothing but the names of its tools."""
        update: dict[str, object] = {"messages": [ChatMessage(role="user")], "chat_template_kwargs": None}
        if request.tools:
            update["tools"] = [{"function": {"name": tool["function"]["name"]}} for tool in request.tools]
        return request.model_copy(update=update)

    def structure(self, request: ChatCompletionRequest, prompts: Sequence[list[int]]) -> Structure | None:
        """Return what the output must be: structured, calls, or either of the two."""
        return chat_structure(request, self._model, prompts[0])

    def parsing(self, request: ChatCompletionRequest) -> Parsing | None:
        """Return how reasoning and tool calls are found in the outputs; None: they are all content."""
        return parsing_of(request, self._model)


class ChatStyle:
    """The choices of a chat completion: a ``message``, or in a stream a ``delta``; the first has the role."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, token_bytes: TokenBytes, request: ChatCompletionRequest) -> None:
        self._token_bytes = token_bytes
        self._with_logprobs = bool(request.logprobs)
        self._with_token_ids = bool(request.return_token_ids)
        self._prompt_logprobs = None
        if request.prompt_logprobs is not None:
            self._prompt_logprobs = PromptLogprobsField(token_bytes, request.prompt_logprobs)

    def chunk_choice(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, object]:
        """Return the new text and logprobs if asked for. The role comes with the first token, not before it."""
        if delta.parts is not None:
            content = _delta_fields(delta.parts, first=first)
        else:
            content = {"role": ROLE, "content": delta.text} if first else {"content": delta.text}
        return {"delta": content, "logprobs": self.logprobs(choice, delta)}

    def is_only_text(self, delta: Delta) -> bool:
        """Return whether a ``delta`` in the middle of a choice has no logprobs to show."""
        return not self._with_logprobs

    def full_choice(self, choice: Choice, text: str, parts: Sequence[Part] | None) -> dict[str, object]:
        """Return the message."""
        message: dict[str, object] = {"role": ROLE, "content": text, "refusal": None}
        return {"message": message if parts is None else message | _message_fields(joined(parts))}

    def logprobs(self, choice: Choice, delta: Delta) -> Logprobs | None:
        """Return the logprobs of the new tokens if asked for."""
        if delta.prompt_logprobs is not None:
            if self._prompt_logprobs is not None and choice.index == 0:
                self._prompt_logprobs.add(delta.prompt_logprobs)
            return None
        return chat_logprobs(self._token_bytes, delta.token_ids, delta.logprobs) if self._with_logprobs else None

    def prompt_fields(self, choices: Sequence[Choice]) -> dict[str, object]:
        """Return the prompt's token ids and logprobs if asked for. All choices have the same prompt."""
        fields: dict[str, object] = {}
        if self._with_token_ids:
            fields["prompt_token_ids"] = choices[0].request.prompt_token_ids
        if self._prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._prompt_logprobs.as_json()
        return fields


def _delta_fields(parts: Sequence[Part], *, first: bool) -> dict[str, object]:
    """Return ``parts`` as the fields of a ``delta``."""
    fields: dict[str, object] = {"role": ROLE, "content": ""} if first else {}
    for part in parts:
        match part:
            case Text(text):
                fields["content"] = text
            case Reasoning(text):
                fields["reasoning_content"] = text
            case CallBegun(index, call_id, name):
                function = {"name": name, "arguments": ""}
                fields["tool_calls"] = [{"index": index, "id": call_id, "type": "function", "function": function}]
            case CallArguments(index, text):
                fields["tool_calls"] = [{"index": index, "function": {"arguments": text}}]
    return fields


def _message_fields(message: Message) -> dict[str, object]:
    """Return the fields that a parsed output adds to a message, or changes: next to calls no content is null."""
    fields: dict[str, object] = {}
    if message.reasoning:
        fields["reasoning_content"] = message.reasoning
    if message.calls:
        fields["content"] = message.content or None
        fields["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    return fields
