"""Bodies made into prompts: the same on the event loop and in a worker."""

from __future__ import annotations

import gzip
import json
import string
from typing import Any

import msgspec
import pytest
from fake_nodes import config
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_level, sentencepiece_like
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from kvrelay.errors import InvalidRequestError, KVRelayError
from router.model import load_model
from router.openai.errors import AnswerError
from router.preparation import INLINE_BYTES, Job, Preparation, PreparedRequest, Task, TooLongForLoopError, inflate
from router.preparation_wire import Answer, Generate, Refusal, decode_job, decode_prompt, decode_reply, encode
from router.preparation_worker import reply_to
from router.text.token_count import TokenCount

HI = [{"role": "user", "content": "hi"}]
PREPARATION = Preparation(load_model(config()))


def job(task: Task, body: dict[str, Any], **fields: Any) -> Job:
    limits: dict[str, Any] = {"max_body_bytes": 1 << 20, "max_model_len": 512, "max_requests": 64}
    return Job(task=task, body=json.dumps(body).encode(), **{**limits, **fields})


def from_worker(work: Job) -> Any:
    """Return what a worker replies, through the wire in both directions, as ``prepare_inline`` returns or raises it."""
    reply = decode_reply(encode(reply_to(PREPARATION, decode_job(encode(work)))))
    match reply.outcome:
        case Answer(body=body):
            return body
        case Refusal(error=error, param=param):
            return error.message, param, error.code, error.http_status
        case Generate(request=fields, prompts=prompts, texts=texts):
            request = PREPARATION.apis[work.task].schema.model_validate_json(fields)
            return PreparedRequest(request, [decode_prompt(prompt) for prompt in prompts], texts)


def inline(work: Job) -> Any:
    try:
        return PREPARATION.prepare_inline(work)
    except TooLongForLoopError:
        return None
    except AnswerError as error:
        return error.error.message, error.param, error.error.code, error.error.http_status
    except KVRelayError as error:
        return error.message, error.param, error.code, error.http_status


FIELDS: dict[str, Any] = {
    "max_tokens": 7,
    "temperature": 1,
    "top_p": 0.5,
    "top_k": -1,
    "logit_bias": {"5": 1, "7": -0.5},
    "seed": -3,
    "n": 2,
    "stop": "END",
    "stop_token_ids": [1, 2],
    "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
    "return_token_ids": True,
    "priority": None,
    "user": "é",
    "unknown": {"a": 1},
}


@pytest.mark.parametrize(
    ("task", "body"),
    [
        ("completions", {"prompt": "abc"}),
        ("completions", {"prompt": ["a", "bc"], "echo": True, "max_tokens": None}),
        ("completions", {"prompt": [[1, 2], [3]], "echo": True}),
        ("completions", {"prompt": "abc", **FIELDS}),
        ("chat", {"messages": HI}),
        ("chat", {"messages": HI, **FIELDS, "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"a": True}}),
        ("chat", {"messages": [{"role": "user", "content": None, "name": "x"}], "max_completion_tokens": 5}),
        ("tokenize", {"prompt": "abc", "return_token_strs": True}),
        ("tokenize", {"messages": HI}),
        ("detokenize", {"tokens": [97, 98]}),
        ("completions", {}),
        ("completions", {"prompt": "a", "model": "other"}),
        ("completions", {"prompt": [1024]}),
        ("completions", {"prompt": "a", "n": 65}),
        ("chat", {"messages": []}),
        ("detokenize", {"tokens": [-1]}),
    ],
)
def test_loop_and_worker_prepare_alike(task: Task, body: dict[str, Any]) -> None:
    work = job(task, body)
    on_loop, in_worker = inline(work), from_worker(work)
    if isinstance(on_loop, PreparedRequest):
        content = {"prompt", "messages", "chat_template_kwargs"}
        assert on_loop.request.model_dump(exclude=content) == in_worker.request.model_dump(exclude=content)
        assert on_loop.request.model_fields_set - content == in_worker.request.model_fields_set - content
        assert (on_loop.prompts, on_loop.texts) == (in_worker.prompts, in_worker.texts)
    else:
        assert on_loop == in_worker


def test_prompts_that_the_router_would_refuse_do_not_travel() -> None:
    message, param, code, _ = from_worker(job("completions", {"prompt": [1] * 512}))
    assert "maximum context length is 512 tokens" in message
    assert (param, code) == ("prompt", "context_length_exceeded")


def test_minimum_above_the_maximum_is_refused_in_the_worker() -> None:
    message, param, *_ = from_worker(job("completions", {"prompt": [1], "max_tokens": 2, "min_tokens": 3}))
    assert "3 is more than may be generated, which is 2" in message
    assert param == "min_tokens"


@pytest.mark.parametrize(
    ("task", "body"),
    [
        ("completions", {"prompt": "a" * INLINE_BYTES}),
        ("chat", {"messages": HI * 65}),
        ("tokenize", {"messages": HI * 65}),
        ("chat", {"messages": HI, "chat_template_kwargs": {"n": 10**9}}),
        ("chat", {"messages": HI, "chat_template_kwargs": {"n": [[1]]}}),
    ],
)
def test_what_takes_long_is_not_done_on_the_loop(task: Task, body: dict[str, Any]) -> None:
    with pytest.raises(TooLongForLoopError):
        PREPARATION.prepare_inline(job(task, body))


def test_short_gzip_of_a_long_body_is_not_done_on_the_loop() -> None:
    work = job("tokenize", {"prompt": "a" * INLINE_BYTES})
    packed = msgspec.structs.replace(work, body=gzip.compress(work.body), gzipped=True)
    assert len(packed.body) < 100
    with pytest.raises(TooLongForLoopError):
        PREPARATION.prepare_inline(packed)
    assert json.loads(from_worker(packed))["count"] == INLINE_BYTES


@given(st.binary(max_size=200))
def test_gzip_there_and_back(content: bytes) -> None:
    assert inflate(gzip.compress(content), 200) == content


@given(st.binary(max_size=60))
def test_no_bytes_break_gzip(body: bytes) -> None:
    try:
        inflate(body, 1000)
    except (InvalidRequestError, AnswerError) as error:
        assert "gzip" in str(error)


# ---------------------------------------------------------------- how many tokens a text has at least


def with_normalizer(normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizer
    return tokenizer


NFC = with_normalizer(normalizers.NFC())
COUNTED = {"byte level": byte_level(), "sentencepiece": sentencepiece_like(), "nfc": NFC}
TEXTS = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(string.ascii_letters)))


@pytest.mark.parametrize("name", COUNTED)
@given(text=TEXTS)
def test_fewest_tokens_are_no_more_than_there_are(name: str, text: str) -> None:
    tokenizer = COUNTED[name]
    assert TokenCount(tokenizer).fewest(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    "text", ["e\u0301" * 500, "\u1112\u1161\u11ab" * 500, "\u212a" * 500, "\u1fef" * 500, " " * 900]
)
@pytest.mark.parametrize("name", COUNTED)
def test_fewest_tokens_of_what_composition_shortens(name: str, text: str) -> None:
    test_fewest_tokens_are_no_more_than_there_are.hypothesis.inner_test(name, text)


def test_fewest_tokens_are_many_for_a_long_text() -> None:
    for tokenizer in COUNTED.values():
        assert TokenCount(tokenizer).fewest("a" * 100_000) > 1000


def stripping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def dropping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        stripping(),
        dropping(),
        with_normalizer(normalizers.Strip()),
        with_normalizer(normalizers.Replace("  ", " ")),
        with_normalizer(normalizers.NFKC()),
        Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
        Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)),
        Tokenizer(models.BPE({"a": 0}, [])),
    ],
)
def test_nothing_is_known_of_tokenizers_that_may_drop_text(tokenizer: Tokenizer) -> None:
    count = TokenCount(tokenizer)
    assert [count.fewest(text) for text in ("", "a", " " * 10_000)] == [0, 1, 1]


DEEP_BODIES: list[tuple[Task, str]] = [
    ("responses", '{"input": "a", "tools": [{"type": "function", "name": "f", "parameters": {"enum": DEEP}}]}'),
    ("responses", '{"input": "a", "text": {"format": {"type": "text", "more": DEEP}}}'),
    ("messages", '{"messages": HI, "max_tokens": 1, "tools": [{"name": "f", "input_schema": {"enum": DEEP}}]}'),
    ("chat", '{"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": DEEP}}}}'),
    ("chat", '{"messages": HI, "chat_template_kwargs": {"more": DEEP}}'),
]


@pytest.mark.parametrize(("task", "body"), DEEP_BODIES)
def test_a_deep_body_is_refused_or_prepared(task: Task, body: str) -> None:
    """Whatever finds it too deep, the answer says that the body is wrong."""
    codes = set()
    for depth in range(850, 1010):
        text = body.replace("HI", json.dumps(HI)).replace("DEEP", "[" * depth + "]" * depth)
        work = msgspec.structs.replace(job(task, {}), body=text.encode())
        for prepared in (inline(work), from_worker(work)):
            if isinstance(prepared, tuple):
                codes.add(prepared[2])
    assert codes == {"invalid_request_error"}
