"""The tokenizer of engines without a model: tokens are bytes, and further ids have made-up texts."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def plain_tokens(vocab_size: int) -> Tokenizer:
    """Return a tokenizer whose ids 0 to 255 are the bytes and whose other ids read `` t256``, `` t257`` and so on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: token_id for token_id, char in enumerate(alphabet)}
    vocab |= {f"\u0120t{token_id}": token_id for token_id in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
