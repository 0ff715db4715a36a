"""Two small tokenizers, one of each family: byte-level BPE (Qwen, Llama 3) and sentencepiece-like (Llama 2, Ernie)."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, hello there! stop STOP END",
    "Ein Pferd frißt keinen Gurkensalat. Ça va? Über Größe, naïve café.",
    "你好，世界。今天天气很好。 こんにちは世界 안녕하세요",
    "emoji: 😀 😃 🎉 👨‍👩‍👧 🇩🇪 done",
    "def f(x):\n    return x + 1\n\nprint(f(41))",
]
BOS, EOS = "<s>", "</s>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"


def byte_level(vocab_size: int = 420) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[EOS, IM_START, IM_END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think here>", special=False)])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    pieces = {EOS: 0, BOS: 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for char in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?ßüé0123456789":
        pieces[char] = len(pieces)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "h"), ("l", "o"), ("▁h", "e"), ("▁", "▁")]
    for left, right in merges:
        pieces[left + right] = len(pieces)
    tokenizer = Tokenizer(models.BPE(pieces, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([EOS, BOS, "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, pieces[BOS])])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found
