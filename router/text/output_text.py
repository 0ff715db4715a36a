"""The text of one choice in progress: detokenized, ended by stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kvrelay.tokenizer.token_bytes import TokenBytes
from router.text.detokenizer import Detokenizer
from router.text.stop import NO_STOPS, StopMatcher, StopStrings

NO_IDS: frozenset[int] = frozenset()


class TextOptions(msgspec.Struct, frozen=True):
    """Text options of a request. ``min_tokens``: a stop string ends the text only after more than this many tokens.

    ``shown_ids``: special tokens that are not skipped.
    """

    stop: StopStrings = NO_STOPS
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    shown_ids: frozenset[int] = NO_IDS


class TextDelta(NamedTuple):
    """New text, the number of tokens used for it, and the stop string that ended it, if any."""

    text: str
    num_tokens: int
    stop: str | None


class OutputText:
    """Text for the output tokens that follow ``prompt_token_ids``."""

    def __init__(self, token_bytes: TokenBytes, prompt_token_ids: Sequence[int], options: TextOptions) -> None:
        self._options = options
        self._detokenizer = Detokenizer(
            token_bytes,
            prompt_token_ids,
            skip_special_tokens=options.skip_special_tokens,
            shown_ids=options.shown_ids,
        )
        self._matcher = StopMatcher(options.stop, include_stop=options.include_stop)
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int], *, stopped: bool = False) -> TextDelta:
        """Add new tokens. Tokens after the one that completes a stop string are ignored.

        ``stopped``: the last of them is the token that ended the request, so it is shown only if the client wants that.
        """
        if not self._options.stop.searches:
            shows_all = not stopped or self._options.include_stop
            text = self._detokenizer.push_all(token_ids if shows_all else token_ids[:-1])
            return TextDelta(text, len(token_ids), None)
        shown: list[str] = []
        for count, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            if stopped and count == len(token_ids) and not self._options.include_stop:
                break
            text = self._detokenizer.push(token_id)
            scan = self._matcher.push(text, armed=self._num_tokens > self._options.min_tokens)
            shown.append(scan.text)
            if scan.matched is not None:
                return TextDelta("".join(shown), count, scan.matched)
        return TextDelta("".join(shown), len(token_ids), None)

    def finish(self) -> TextDelta:
        """Return the text that is still held back at the end of the tokens."""
        scan = self._matcher.push(self._detokenizer.finish())
        return TextDelta(scan.text if scan.matched else scan.text + self._matcher.flush(), 0, scan.matched)
