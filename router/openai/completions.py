"""``/v1/completions``: prompts without a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvrelay.errors import InvalidRequestError
from kvrelay.protocol.request import PromptLogprobs
from router.model import ServedModel
from router.openai.answer import Answer, AnswerHead, Writer
from router.openai.choice import Choice, Delta
from router.openai.dialect import Reading
from router.openai.logprobs import CompletionLogprobs, Logprobs
from router.openai.prompt_logprobs import PromptLogprobsField, entries
from router.openai.sampling import check_text_ids, check_text_length, check_token_ids, truncated
from router.openai.schemas import CompletionRequest, parse
from router.openai.structured import Structure, structure_of
from router.tools.parts import Part


class Completions:
    """The request and answer style of completions."""

    name = "completions"
    id_prefix = "cmpl-"
    schema = CompletionRequest

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def read(self, body: dict[str, Any], max_model_len: int) -> Reading:
        """Return the request that ``body`` is. Raises InvalidRequestError."""
        return Reading(parse(CompletionRequest, body))

    def num_prompts(self, request: CompletionRequest) -> int:
        """Return the number of prompts."""
        return len(_each(request.prompt))

    def prompts(self, request: CompletionRequest, max_model_len: int) -> list[list[int]]:
        """Return the token ids of each prompt.

        Raises InvalidRequestError if there are none, or unknown ones, PromptTooLongError if a text is certainly longer
        than ``max_model_len`` tokens.
        """
        prompts = [
            truncated(self._token_ids(prompt, request, max_model_len), request, max_model_len)
            for prompt in _each(request.prompt)
        ]
        if not all(prompts):
            raise InvalidRequestError("prompt: has no tokens", param="prompt")
        return prompts

    def texts(self, request: CompletionRequest) -> list[str] | None:
        """Return each prompt as text for an echo."""
        return [self._text(prompt) for prompt in _each(request.prompt)] if request.echo else None

    def writer(
        self,
        head: AnswerHead,
        request: CompletionRequest,
        choices: Sequence[Choice],
        texts: Sequence[str] | None,
        echo: bytes,
    ) -> Writer:
        """Return what writes the answer."""
        return Answer(head, CompletionStyle(self._model, request, choices, texts), choices, request)

    def without_content(self, request: CompletionRequest) -> CompletionRequest:
        """Return ``request`` without its prompt."""
        return request.model_copy(update={"prompt": "-"})

    def structure(self, request: CompletionRequest, prompts: Sequence[list[int]]) -> Structure | None:
        """Return the structured output that the request asks for."""
        return structure_of(request)

    def parsing(self, request: CompletionRequest) -> None:
        """Return nothing: all output is text."""

    def _token_ids(self, prompt: str | list[int], request: CompletionRequest, max_model_len: int) -> list[int]:
        if isinstance(prompt, str):
            if request.truncate_prompt_tokens is None:
                check_text_length(prompt, self._model, max_model_len, "prompt")
            add_special_tokens = request.add_special_tokens is not False
            token_ids = self._model.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            check_text_ids(token_ids, self._model, "prompt")
            return token_ids
        check_token_ids(prompt, self._model.vocab_size, "prompt")
        return prompt

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._model.tokenizer.decode(prompt)


class CompletionStyle:
    """The choices of a completion: ``text``, after the prompt's text with ``echo``."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(
        self,
        model: ServedModel,
        request: CompletionRequest,
        choices: Sequence[Choice],
        prompt_texts: Sequence[str] | None,
    ) -> None:
        self._with_token_ids = bool(request.return_token_ids)
        self._prompt_texts = prompt_texts
        self._logprobs = None
        self._prompt_logprobs = None
        token_bytes = model.tokenizer.token_bytes
        if request.logprobs is not None:
            self._logprobs = [
                CompletionLogprobs(
                    token_bytes, request.logprobs, choice.request.prompt_token_ids[0] if request.echo else None
                )
                for choice in choices
            ]
        if request.prompt_logprobs is not None:
            self._prompt_logprobs = [PromptLogprobsField(token_bytes, request.prompt_logprobs) for _ in choices]
        self._echoes = bool(request.echo)

    def chunk_choice(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, object]:
        """Return the new text, logprobs if asked for, and the prompt's part with the first."""
        text = self._echo(choice) + delta.text if first else delta.text
        item: dict[str, object] = {"text": text, "logprobs": self.logprobs(choice, delta)}
        return item | self._prompt_ids(choice) if first else item

    def is_only_text(self, delta: Delta) -> bool:
        """Return whether a ``delta`` in the middle of a choice has no logprobs to show."""
        return self._logprobs is None

    def full_choice(self, choice: Choice, text: str, parts: Sequence[Part] | None) -> dict[str, object]:
        """Return the text and the prompt's part."""
        item = {"text": self._echo(choice) + text, **self._prompt_ids(choice)}
        if self._prompt_logprobs:
            item["prompt_logprobs"] = self._prompt_logprobs[choice.index].as_json()
        return item

    def logprobs(self, choice: Choice, delta: Delta) -> Logprobs | None:
        """Return the logprobs of the new tokens if asked for, with ``echo`` those of the prompt too."""
        if delta.prompt_logprobs is not None:
            return self._of_prompt(choice, delta.prompt_logprobs)
        return self._logprobs[choice.index].of(delta.token_ids, delta.logprobs) if self._logprobs else None

    def _of_prompt(self, choice: Choice, logprobs: PromptLogprobs) -> Logprobs | None:
        if self._prompt_logprobs:
            self._prompt_logprobs[choice.index].add(logprobs)
        if not self._logprobs or not self._echoes:
            return None
        token_ids, items = zip(*entries(logprobs), strict=True)
        return self._logprobs[choice.index].of(token_ids, items)

    def prompt_fields(self, choices: Sequence[Choice]) -> dict[str, object]:
        """Return nothing, because each choice has its prompt's fields."""
        return {}

    def _echo(self, choice: Choice) -> str:
        return self._prompt_texts[choice.prompt_index] if self._prompt_texts else ""

    def _prompt_ids(self, choice: Choice) -> dict[str, object]:
        return {"prompt_token_ids": choice.request.prompt_token_ids} if self._with_token_ids else {}


def _each(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Return the prompts in ``prompt``, one or several."""
    if isinstance(prompt, str):
        return [prompt]
    several: list[str | list[int]] = [item for item in prompt if not isinstance(item, int)]
    return several or [[item for item in prompt if isinstance(item, int)]]
