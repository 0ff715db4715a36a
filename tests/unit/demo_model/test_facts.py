from __future__ import annotations

from random import Random

import pytest
from demo_model.facts import (
    Notebook,
    Spot,
    Thing,
    carelessly,
    gibberish,
    kind_to_count,
    random_things,
    small_talk,
    unknown_thing,
)
from demo_model.tokenizer import build_tokenizer
from demo_model.vocabulary import FALLBACK, KINDS, SMALL_TALK, words

RED_KEY, KEY, BLUE_KEY, LAMP = Thing("red", "key"), Thing("", "key"), Thing("blue", "key"), Thing("red", "lamp")


def test_the_last_word_on_a_thing_counts() -> None:
    rng, notebook = Random(1), Notebook()
    notebook.tell(rng, RED_KEY)
    notebook.tell(rng, LAMP)
    before = notebook.where(RED_KEY)
    said = notebook.tell(rng, RED_KEY)
    assert notebook.where(RED_KEY) != before
    assert str(notebook.spots[RED_KEY].number) in said


def test_a_fact_is_its_own_answer() -> None:
    notebook = Notebook()
    assert notebook.tell(Random(2), KEY) == notebook.where(KEY)
    assert notebook.where(KEY).startswith("The key ")


def test_what_was_not_told_is_not_mentioned() -> None:
    assert Notebook().where(RED_KEY) == "The red key was not mentioned."


def test_counts() -> None:
    rng, notebook = Random(3), Notebook()
    assert notebook.how_many("key") == "Number of keys: 0."
    notebook.tell(rng, RED_KEY)
    assert notebook.how_many("key") == "Number of keys: 1."
    for thing in (RED_KEY, BLUE_KEY, LAMP):
        notebook.tell(rng, thing)
    assert notebook.how_many("key") == "Number of keys: 2."
    for adjective in ["green", "yellow", "black", "white", "brown", "grey", "orange", "purple"]:
        notebook.tell(rng, Thing(adjective, "key"))
    assert notebook.how_many("key") == "Number of keys: many."


def test_kinds_with_things_that_were_told_again_without_a_mark_are_not_counted() -> None:
    rng, notebook = Random(12), Notebook()
    for thing in (RED_KEY, LAMP):
        notebook.tell(rng, thing)
    assert notebook.tell(rng, RED_KEY).startswith(("No, the", "Actually, the", "Correction: the"))
    assert notebook.kinds() == ["key", "lamp"]
    assert notebook.tell(rng, RED_KEY, unmarked=1.0).startswith("The red key ")
    assert notebook.kinds() == ["lamp"]
    notebook.tell(rng, Thing("zorp", "lamp"))
    assert notebook.kinds() == []


@pytest.mark.parametrize(("verb", "changed"), [("is", "is now in box 3"), ("lies", "now lies in box 3")])
def test_a_spot_that_changed(verb: str, changed: str) -> None:
    assert Spot(verb, "in", "box", 3).changed() == changed


def test_an_unknown_thing_was_not_told_but_mostly_looks_like_one_that_was() -> None:
    rng, notebook = Random(4), Notebook()
    for thing in random_things(rng, 20):
        notebook.tell(rng, thing)
    things = [unknown_thing(rng, notebook) for _ in range(100)]
    assert not set(things) & set(notebook.spots)
    kinds = {thing.kind for thing in notebook.spots}
    assert sum(thing.kind in kinds for thing in things) > 60


def test_every_number_of_things_is_asked_for_alike() -> None:
    rng, notebook = Random(11), Notebook()
    for thing in [RED_KEY, BLUE_KEY, KEY, *(Thing("old", kind) for kind in KINDS if kind != "key")]:
        notebook.tell(rng, thing)
    counts = [notebook.count(kind_to_count(rng, notebook)) for _ in range(200)]
    assert 60 < counts.count(3) < 140
    assert notebook.count(kind_to_count(rng, notebook, most=2)) == 1


def test_things_differ() -> None:
    for count in (1, 2, 30, 250):
        assert len(set(random_things(Random(5), count))) == count


def test_every_word_of_the_language_is_in_the_vocabulary() -> None:
    vocab = build_tokenizer().get_vocab()
    assert [word for word in words() if f"Ġ{word}" not in vocab] == []


def test_gibberish_is_answered_with_what_the_model_knows() -> None:
    rng = Random(6)
    answers = {small_talk(rng)[1] for _ in range(300)}
    assert answers == {FALLBACK, *SMALL_TALK.values()}
    assert gibberish(rng) != gibberish(rng)


def test_careless_typing_keeps_the_words() -> None:
    rng = Random(7)
    forms = {carelessly(rng, "Where is it?") for _ in range(200)}
    assert forms == {"Where is it?", "where is it?", "Where is it", "where is it"}
