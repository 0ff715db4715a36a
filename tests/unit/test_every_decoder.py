"""Everything that reads what others wrote refuses garbage with a typed error, in bounded time and memory.

A few inputs for each decoder, the same each time; ``scripts/fuzz`` gives them millions. ``KEPT`` are inputs that it
found, each with the decoder that once broke on it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from support.decoders import JSON_WORDS, Decoder, DecoderError, check, decoders, guarded
from support.mutations import Mutator

NUM_INPUTS = 15

DEEP = b"[" * 30_000
NAMES = b"abcdefghijklm"
KEPT: dict[str, list[bytes]] = {
    "offer of a link": [b'{"x": ' + DEEP],
    "key": [b"#" * 40],
    "config": [
        b"a: &a [x]\n"
        + b"".join(b"%c: &%c [%b]\n" % (b, b, b", ".join([b"*%c" % a] * 9)) for a, b in itertools.pairwise(NAMES)),
        b"a: !!timestamp x",
        b"a: !!bool x",
        b"model: {path: " + b"k" * 5000 + b"}\nnodes: [{name: m0, role: mixed, port: 8200}]",
    ],
    "override of a config": [
        b"9" * 5000,
        b"nodes." + b"9" * 5000 + b"=1",
        b"\xff=1",
        b"a.b=!!timestamp x",
        b"a" + b".n" * 20_000 + b"=1",
        b"a.b=" + b"[" * 3000,
    ],
    "config.json": [
        b'{"architectures": 0.5}',
        b'{"architectures": [["x"]]}',
    ],
    "generation_config.json": [b'{"eos_token_id": 0.5}', b'{"temperature": -1%b}' % (b"0" * 400)],
    "model.safetensors.index.json": [b'{"weight_map": {"a": "x", "b": 0.5}}', DEEP],
    "tokenizer_config.json": [
        b'{"tokenizer_class": 7}',
        b'{"pad_token": "\\ud800"}',
        b'{"chat_template": "{{ %b }}"}' % (b"(" * 300),
    ],
    "tokenizer.json": [
        b'{"model": {"type": "BPE", "continuing_subword_prefix": "###", "vocab": {"a": 0, "b": 1}, '
        b'"merges": [["a", "b"]]}}'
    ],
    "special_tokens_map.json": [b'{"additional_special_tokens": ["\\ud800"]}'],
    "added_tokens.json": [b'{"<x>": Infinity}'],
    "chat_template.jinja": [
        b"{{ " + b"-" * 3000 + b"1 }}",
        b"{{ " + b"1" * 5000 + b" }}",
        b"{{ 'x' + m" + b".c" * 300 + b" }}",
    ],
    "header of safetensors": [DEEP, b'{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'],
    "job of a preparation worker": [b"", b"\x91" * 30_000],
    "reply of a preparation worker": [b"", b"\x82\xa7outcome\xa1\xff\xaeunknown_fields\x90", b"\x91" * 30_000],
    "prompt of a preparation worker": [b"", b"\x91\xa1x"],
    "ShareGPT file": [DEEP],
    "trace of Mooncake": [
        DEEP,
        b'{"timestamp": 0, "input_length": Infinity, "output_length": 1}',
        b'{"timestamp": 0, "input_length": 1, "output_length": -1%b}' % (b"0" * 400),
        b'{"timestamp": 1%b, "input_length": 1, "output_length": 1}' % (b"0" * 400),
        b'{"timestamp": 0, "input_length": 1000000000000, "output_length": 1}',
    ],
    "event of a stream": [b'{"error": "\xff"}', b'{"error": ' + DEEP],
}


@pytest.fixture(scope="module")
def all_decoders(tmp_path_factory: pytest.TempPathFactory) -> list[Decoder]:
    return decoders(tmp_path_factory.mktemp("decoders"))


def test_examples_are_accepted(all_decoders: list[Decoder]) -> None:
    with guarded():
        for decoder in all_decoders:
            accepted = [check(decoder, example) for example in decoder.examples]
            assert True in accepted or decoder.name in ("safetensors", "config"), decoder.name


def test_inputs_of_a_fuzzer_are_accepted_or_refused(all_decoders: list[Decoder]) -> None:
    with guarded():
        for decoder in all_decoders:
            mutator = Mutator(random.Random(7), decoder.examples, decoder.notation, decoder.words)
            for _ in range(NUM_INPUTS):
                check(decoder, mutator.next())


def test_inputs_that_were_found_are_accepted_or_refused(all_decoders: list[Decoder]) -> None:
    by_name = {decoder.name: decoder for decoder in all_decoders}
    with guarded():
        for name, inputs in KEPT.items():
            for data in inputs:
                check(by_name[name], data)


def broken() -> Iterator[tuple[Decoder, str]]:
    def loop(_: bytes) -> None:
        while True:
            pass

    def fill(_: bytes) -> None:
        bytearray(1 << 34)

    yield Decoder("wrong exception", lambda data: [][len(data)], (ValueError,), [b""]), "IndexError"
    yield Decoder("memory", fill, (ValueError,), [b""]), "MemoryError"
    yield Decoder("time", loop, (ValueError,), [b""]), "_TooLongError"


@pytest.mark.parametrize(("decoder", "kind"), list(broken()), ids=["exception", "memory", "time"])
def test_a_decoder_that_breaks_is_found(decoder: Decoder, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.decoders.MAX_CPU_S", 0.01)
    with guarded(), pytest.raises(DecoderError, match=kind):
        check(decoder, b"")


def test_a_mutator_makes_the_same_inputs_again_and_different_ones() -> None:
    def inputs(seed: int) -> list[bytes]:
        mutator = Mutator(random.Random(seed), [b'{"a": [1, "x"]}'], None, JSON_WORDS)
        return [mutator.next() for _ in range(50)]

    assert inputs(1) == inputs(1)
    assert len(set(inputs(1) + inputs(2))) > 80
