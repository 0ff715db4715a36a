"""One choice of an answer in progress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import FinishReason, PromptLogprobs, TokenLogprobs
from kvrelay.tokenizer.token_bytes import TokenBytes
from router.events import NewRequest, TokensDelivered
from router.text.output_text import OutputText, TextOptions
from router.tools.output_parser import OutputParser
from router.tools.parts import CallArguments, CallBegun, Part, Text, merged

TOOL_CALLS = "tool_calls"
"""The finish reason of an output that ended by itself and has tool calls."""


class Delta(msgspec.Struct, frozen=True):
    """New output of choice ``index``. The last one has a ``finish_reason``.

    ``stop_reason``: the stop string, or the client's stop token id, that ended it. ``parts``: what a parser has found
    in the text, which ``text`` then has the content of; None: the output is not parsed. Deltas with ``prompt_logprobs``
    have nothing else and come before all others.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    parts: list[Part] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def is_news(self) -> bool:
        """Whether it needs a chunk. Tokens do even without text, because clients count and time chunks."""
        return bool(self.token_ids or self.text or self.finish_reason or self.prompt_logprobs)

    def pieces(self) -> list[Delta]:
        """Return deltas of one part each, since OpenAI's clients expect no more in a chunk.

        The first has the tokens. The end of an output with calls is a delta of its own.
        """
        parts = self.parts or []
        ends = self.finish_reason is not None
        alone = ends and any(isinstance(part, CallBegun | CallArguments) for part in parts)
        groups = [[part] for part in parts] + ([[]] if alone or not parts else [])
        last = len(groups) - 1
        return [
            replace(
                self,
                text=_content(group),
                token_ids=[] if index else self.token_ids,
                logprobs=[] if index else self.logprobs,
                finish_reason=self.finish_reason if index == last else None,
                stop_reason=self.stop_reason if index == last else None,
                parts=group,
            )
            for index, group in enumerate(groups)
        ]


def _content(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


class Choice:
    """Makes deltas of the deliveries for one request, and counts its tokens."""

    def __init__(
        self,
        index: int,
        prompt_index: int,
        request: NewRequest,
        token_bytes: TokenBytes,
        options: TextOptions,
        parser: OutputParser | None = None,
    ) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.request = request
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.stop_matched = False
        self.finish_reason: FinishReason | None = None
        self._text = OutputText(token_bytes, request.prompt_token_ids, options)
        self._parser = parser

    @property
    def finished(self) -> bool:
        """Whether it has its last delta."""
        return self.finish_reason is not None

    @property
    def request_id(self) -> RequestId:
        """The id of the request."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt_token_ids)

    def take(self, tokens: TokensDelivered) -> Delta:
        """Return the delta of ``tokens``. Do not call it after the choice has finished."""
        stopped = tokens.finish_reason is FinishReason.STOP
        text, num_tokens, stop = self._text.push(tokens.token_ids, stopped=stopped)
        finish_reason, stop_reason = tokens.finish_reason, tokens.stop_token_id
        if finish_reason is not None and stop is None:
            rest, _, stop = self._text.finish()
            text += rest
        if stop is not None:
            finish_reason, stop_reason, self.stop_matched = FinishReason.STOP, None, True
        self.num_tokens += num_tokens
        self.num_cached_tokens = max(self.num_cached_tokens, tokens.num_cached_tokens)
        self.finish_reason = finish_reason
        delta = Delta(
            self.index,
            text,
            tokens.token_ids[:num_tokens],
            tokens.logprobs[:num_tokens],
            finish_reason,
            stop if stop is not None else stop_reason,
        )
        return delta if self._parser is None else _parsed(delta, self._parser)


def _parsed(delta: Delta, parser: OutputParser) -> Delta:
    """Return ``delta`` with the parts of its text."""
    parts = parser.push(delta.text)
    finish_reason = delta.finish_reason
    if finish_reason is not None:
        parts = merged([*parts, *parser.finish()])
    if finish_reason == FinishReason.STOP and parser.has_calls:
        finish_reason = TOOL_CALLS
    return replace(delta, text=_content(parts), finish_reason=finish_reason, parts=parts)


def usage(choices: Sequence[Choice]) -> dict[str, object]:
    """Return the ``usage`` of an answer. Each prompt counts once, for any ``n``."""
    prompts = _of_prompts(choices)
    num_prompt = sum(choice.num_prompt_tokens for choice in prompts)
    num_tokens = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in prompts)},
    }


def num_prompt_tokens(choices: Sequence[Choice]) -> int:
    """Return the tokens of all prompts of an answer."""
    return sum(choice.num_prompt_tokens for choice in _of_prompts(choices))


def _of_prompts(choices: Sequence[Choice]) -> Iterable[Choice]:
    """Return the first choice of each prompt."""
    return {choice.prompt_index: choice for choice in reversed(choices)}.values()
