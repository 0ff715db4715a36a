"""Conversations with tools over several turns: streams say the same, and so does the prompt of the next turn."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from support.schemas import END, VOCAB_SIZE
from support.tools import Answering, model_of, without_ids

from kvrelay.protocol.request import FinishReason
from kvrelay.tokenizer.plain import plain_tokens
from router.openai.chat import chat_prompt
from router.openai.schemas import ChatCompletionRequest, parse
from router.text.tokenizer import TextTokenizer

FAMILIES = ("hermes", "llama3", "mistral", "pythonic")
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]"
    "{% endfor %}{% endfor %}<assistant>"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look_up", "add", "now")
]
TEXTS = ["", "a", "Žilina", 'say "hi"', "a\nb", "{}", "[1, 2]", "</tool_call>x", "\\", "it's", "🙂 [TOOL_CALLS]"]
_plain = plain_tokens(VOCAB_SIZE)

Call = tuple[str, dict[str, Any]]


def value(rng: random.Random, depth: int = 0) -> Any:
    kinds: list[Any] = [rng.choice(TEXTS), rng.randint(-99, 99), 2.5, True, None]
    if depth < 2:
        kinds.append([value(rng, depth + 1) for _ in range(rng.randint(0, 2))])
        kinds.append({rng.choice("xyz"): value(rng, depth + 1) for _ in range(rng.randint(0, 2))})
    return rng.choice(kinds)


def drawn_calls(rng: random.Random) -> list[Call]:
    """Return one to three calls."""
    return [
        (rng.choice(TOOLS)["function"]["name"], {key: value(rng) for key in rng.sample("abc", rng.randint(0, 3))})  # type: ignore[index]
        for _ in range(rng.randint(1, 3))
    ]


def written(family: str, calls: Sequence[Call], rng: random.Random) -> tuple[str, str]:
    """Return the content before the calls, and the output, as a model with this format writes both."""
    ascii_only = rng.random() < 0.5

    def spelled(key: str) -> list[str]:
        return [json.dumps({"name": name, key: its}, ensure_ascii=ascii_only) for name, its in calls]

    content = rng.choice(["", "Let me see. "]) if family in ("hermes", "mistral") else ""
    match family:
        case "hermes":
            return content, content + "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in spelled("arguments"))
        case "llama3":
            return content, "; ".join(spelled("parameters"))
        case "mistral":
            return content, content + f"[TOOL_CALLS][{', '.join(spelled('arguments'))}]"
        case _:
            its = [f"{name}({', '.join(f'{key}={one!r}' for key, one in its.items())})" for name, its in calls]
            return content, f"[{', '.join(its)}]"


class Conversation:
    """One client that reads whole answers, and one that reads streams: both see the same, and send the same back."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.family = FAMILIES[seed % len(FAMILIES)]
        tokenizer = TextTokenizer(_plain, {}, TEMPLATE)
        self.model = replace(model_of(self.family), tokenizer=tokenizer)
        question = [{"role": "user", "content": f"question {seed}"}]
        self.whole: list[dict[str, Any]] = [*question]
        self.streamed: list[dict[str, Any]] = [*question]

    def request(self, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
        return parse(ChatCompletionRequest, {"messages": messages, "tools": TOOLS})

    def turn(self, output: str) -> dict[str, Any]:
        """Let the model write ``output``; return the message."""
        requests = self.request(self.whole), self.request(self.streamed)
        prompts = [chat_prompt(request, self.model, 4096) for request in requests]
        assert prompts[0] == prompts[1]
        tokens: list[int] = [*_plain.encode(output).ids, END]
        answer = Answering(self.model, requests[0]).whole(tokens, FinishReason.STOP)
        stream = Answering(self.model, requests[1]).streamed(self.cut(tokens), FinishReason.STOP)
        assert without_ids(stream["message"]) == without_ids(answer["message"])
        assert stream["finish_reason"] == answer["finish_reason"]
        self.whole.append(answer["message"])
        self.streamed.append(stream["message"])
        message: dict[str, Any] = answer["message"]
        return message

    def results(self) -> None:
        """Each client tells the results of the calls, by the ids that it was given."""
        contents = [str(self.rng.choice(TEXTS)) for _ in self.whole[-1]["tool_calls"]]
        for messages in (self.whole, self.streamed):
            calls = messages[-1]["tool_calls"]
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": content}
                for call, content in zip(calls, contents, strict=True)
            ]

    def cut(self, tokens: list[int]) -> list[list[int]]:
        """Return ``tokens`` in steps of one or several, as nodes send them."""
        most, steps, done = self.rng.choice([1, 3, 12]), [], 0
        while done < len(tokens):
            count = self.rng.randint(1, most)
            steps.append(tokens[done : done + count])
            done += count
        return steps


@pytest.mark.parametrize("seed", range(50))
def test_a_conversation_is_the_same_in_streams(seed: int) -> None:
    """User, calls, results, perhaps more calls and results, answer, and a further question with an answer."""
    talk = Conversation(seed)
    for _ in range(talk.rng.randint(1, 3)):
        calls = drawn_calls(talk.rng)
        content, output = written(talk.family, calls, talk.rng)
        message = talk.turn(output)
        functions = [call["function"] for call in message["tool_calls"]]
        assert [(one["name"], json.loads(one["arguments"])) for one in functions] == calls
        assert (message["content"] or "").strip() == content.strip()
        talk.results()
    for number in range(2):
        answer = f"It is {talk.rng.randint(0, 99)}, Žilina: {{}}."
        assert talk.turn(answer)["content"] == answer
        more = {"role": "user", "content": f"and {number}?"}
        talk.whole.append(more)
        talk.streamed.append(more)
