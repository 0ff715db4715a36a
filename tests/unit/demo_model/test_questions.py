from __future__ import annotations

import re
from random import Random

import pytest
from demo_model.dialogue import Mix, training_dialogue
from demo_model.questions import FILLING_TASKS, TASKS, Question, ask, questions
from demo_model.tokenizer import build_tokenizer, render
from demo_model.vocabulary import PLURALS

TOKENIZER = build_tokenizer()


def num_tokens(question: Question) -> int:
    chat = [*question.messages, {"role": "assistant", "content": question.answer}]
    return len(TOKENIZER.encode(render(chat), add_special_tokens=False).ids)


def told(question: Question) -> str:
    return " ".join(message["content"] for message in question.messages)


def test_a_seed_fixes_the_questions() -> None:
    assert questions(1, 20, 500) == questions(1, 20, 500)
    assert questions(1, 20, 500) != questions(2, 20, 500)


@pytest.mark.parametrize("max_tokens", [100, 250, 2000])
def test_questions_fit(max_tokens: int) -> None:
    assert max(num_tokens(question) for question in questions(3, 64, max_tokens)) <= max_tokens


@pytest.mark.parametrize("task", FILLING_TASKS)
def test_chats_of_facts_are_nearly_as_long_as_they_may_be(task: str) -> None:
    rng = Random(4)
    assert min(num_tokens(ask(rng, task, 2000)) for _ in range(8)) > 1500


def test_every_task_takes_its_turn() -> None:
    assert [question.task for question in questions(5, len(TASKS), 300)] == list(TASKS)
    assert {question.task for question in questions(5, 9, 300, tasks=("count",))} == {"count"}


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 100"):
        questions(1, 1, 99)


@pytest.mark.parametrize("task", ["recall", "recall in noise", "recall over turns"])
def test_the_answer_to_a_recall_was_told_once(task: str) -> None:
    rng = Random(6)
    for _ in range(20):
        question = ask(rng, task, 500)
        assert told(question).count(question.answer) == 1


def test_the_answer_to_a_correction_is_the_last_place() -> None:
    rng = Random(7)
    for _ in range(20):
        question = ask(rng, "corrected", 500)
        thing = re.split(r" (?=is|lies|stands|hangs|rests|sits|waits|stays|hides)", question.answer)[0].removeprefix(
            "The"
        )
        places = re.findall(rf"(?i:the){thing} (?:now )?[a-z]+ (?:now )?([a-z]+ [a-z]+ \d+)\.", told(question))
        assert len(places) == 2
        assert question.answer.endswith(f"{places[-1]}.")


def test_what_is_asked_as_unknown_was_not_told() -> None:
    rng = Random(8)
    for _ in range(20):
        question = ask(rng, "unknown", 500)
        thing = question.answer.removesuffix(" was not mentioned.")
        assert f"{thing} " not in question.messages[0]["content"]


def test_counted_facts_are_there() -> None:
    rng = Random(9)
    for _ in range(20):
        question = ask(rng, "count", 500)
        match = re.fullmatch(r"Number of (\w+): (\d)\.", question.answer)
        assert match
        kind = next(kind for kind, plural in PLURALS.items() if plural == match[1])
        assert len(re.findall(rf" {kind} [a-z]", told(question))) == int(match[2])


def test_training_chats_alternate_and_end_with_an_answer() -> None:
    rng = Random(10)
    for num_facts in (1, 2, 8, 60):
        for _ in range(20):
            chat = training_dialogue(rng, Mix(num_facts=num_facts, num_questions=8))
            roles = [message["role"] for message in chat if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert sum(role == "user" for role in roles) >= 8
