"""Rules for the tokens of an output: those that it may have, and sequences that it may not contain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

_WORD_BYTES = 4


def mask_words(vocab_size: int) -> int:
    """Return the words of a mask: a bit for each token and one for the end of the text, in 32-bit integers."""
    return vocab_size // 32 + 1


def token_mask(token_ids: Iterable[int], vocab_size: int) -> bytes:
    """Return the mask with the bits of ``token_ids``, all of which are in the vocabulary: little-endian words."""
    mask = bytearray(_WORD_BYTES * mask_words(vocab_size))
    for token_id in token_ids:
        mask[token_id >> 3] |= 1 << (token_id & 7)
    return bytes(mask)


class BadWords(msgspec.Struct, frozen=True, array_like=True):
    """Token sequences that an output may not contain.

    ``always``: those of one token. ``after[t]``: those of more tokens whose last but one is ``t``. So what may not come
    next follows from the output, and few sequences are compared with its end.
    """

    always: list[int]
    after: dict[int, list[list[int]]]

    @classmethod
    def of(cls, words: Iterable[Sequence[int]]) -> BadWords:
        """Return those of ``words``, none of which is empty."""
        words = dict.fromkeys(map(tuple, words))
        after: dict[int, list[list[int]]] = {}
        for word in words:
            if len(word) > 1:
                after.setdefault(word[-2], []).append(list(word))
        return cls(sorted(word[0] for word in words if len(word) == 1), after)

    def next(self, output: Sequence[int]) -> list[int]:
        """Return the tokens that may not follow ``output``, the output tokens so far; some may be there twice."""
        if not self.after or not output:
            return self.always
        words = self.after.get(output[-1], ())
        return self.always + [word[-1] for word in words if list(output[-len(word) + 1 :]) == word[:-1]]

    def token_ids(self) -> Iterator[int]:
        """Yield the tokens of all sequences."""
        yield from self.always
        for words in self.after.values():
            for word in words:
                yield from word


class TokenRules(msgspec.Struct, frozen=True, array_like=True):
    """What a request says about the tokens of its output.

    ``allowed``: the mask of the tokens that it may have (``token_mask``); None: any.
    """

    allowed: bytes | None = None
    bad_words: BadWords | None = None

    def may_have(self, token_id: int) -> bool:
        """Return whether ``token_id`` may be in an output at all."""
        if self.bad_words is not None and token_id in self.bad_words.always:
            return False
        return self.allowed is None or bool(self.allowed[token_id >> 3] >> (token_id & 7) & 1)
