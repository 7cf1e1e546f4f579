"""What a searcher says in their own words: what the vocabulary reads of it, and what an engine reads."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceca.config import OracleConfig
from ceca.dialogue.attributes import PERSON
from ceca.dialogue.conversation import Answer, Subject
from ceca.dialogue.oracle import OracleEngine
from ceca.dialogue.understanding import TOKENS, read_words, understand, wording

SHOWN = Subject("0" * 16, b"", {"upper_colour": "red"}, "front")
BAG = "What is the person carrying, if anything?"


@pytest.mark.parametrize(
    ("words", "asked", "understood"),
    [
        ("black", "shoes_colour", {"shoes_colour": "black"}),
        ("Dark blue, I think!", "upper_colour", {"upper_colour": "blue"}),
        ("Not red, it was green.", "upper_colour", {"upper_colour": "green"}),
        ("it wasn't black but grey", "lower_colour", {"lower_colour": "grey"}),
        ("No, the jacket was black", None, {"upper_kind": "jacket", "upper_colour": "black"}),
        ("No, he wore white sneakers and a cap", "carried",
         {"hat": "cap", "shoes_kind": "sneakers", "shoes_colour": "white"}),
        ("She had long blonde hair and a backpack", "carried",
         {"hair_length": "long", "hair_colour": "blond", "carried": "backpack"}),
        ("no, she had a yellow backpack", "upper_colour", {"carried": "backpack"}),  # that was yellow, not the clothes
        ("it was a rather light grey", "upper_colour", {"upper_colour": "grey"}),
        ("no", "hat", {"hat": "none"}),
        ("Nothing.", "carried", {"carried": "none"}),
        ("Nothing.", "hat", {"hat": "none"}),  # which says nothing of the hands
        ("She carried nothing", "hat", {"carried": "none"}),
        ("without a hat", None, {"hat": "none"}),
    ],
)  # fmt: skip
def test_words_of_the_vocabulary_are_understood(words: str, asked: str | None, understood: dict[str, str]):
    assert read_words(words, PERSON, asked) == understood


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("no, the bag was darker", "carried"),  # than what?
        ("black or grey", "shoes_colour"),
        ("black and grey", "shoes_colour"),
        ("maybe black", "shoes_colour"),
        ("I don't know", "hat"),
        ("not black", "shoes_colour"),
        ("the scarf was yellow", "upper_colour"),
        ("Was it black?", "upper_colour"),
        ("Black? No.", "upper_colour"),
        ("Wore he a red jacket?", None),
        ("Der Schal war blue", "upper_colour"),
        ("the clothes were black", "shoes_colour"),
        ("nothing on his head", "shoes_colour"),
        ("I don't know what colour his hair was", "hair_colour"),
        ("I don't remember his hair", None),
        ("not blonde hair", "hair_colour"),
        ("I didn't notice a hat", "hat"),
        ("not a cap", "hat"),
        ("I don't remember anything", "carried"),
        ("the bag was empty", "carried"),
        ("red it was not", "upper_colour"),
        ("Red, I think not", "upper_colour"),
        ("red wasn't it", "upper_colour"),
        ("man, not really", "gender"),
        ("the trousers were lighter than black", "lower_colour"),
        ("hardly red", "upper_colour"),
        ("the shoes are black in the picture, his were white", "shoes_colour"),
        ("No.", "lower_kind"),
        ("no", "shoes_colour"),  # there is no such value
        ("black", None),  # of what?
        ("", "hat"),
        ("🙂" * 100, "hat"),
    ],
)
def test_what_is_in_doubt_or_denied_or_unclear_is_not_understood(words: str, asked: str | None):
    assert read_words(words, PERSON, asked) == {}


def test_each_value_alone_answers_its_question():
    for facet, values in PERSON.items():
        for value in values:
            assert read_words(f"{value.capitalize()}.", PERSON, facet)[facet] == value


def test_other_vocabularies_are_read_where_they_are_asked_about():
    choices = {"mood": ("happy", "sad"), "bag_size": ("small", "large")}
    assert read_words("Sad, I would say.", choices, "mood") == {"mood": "sad"}
    assert read_words("a large bag", choices, "bag_size") == {"bag_size": "large"}


@given(st.lists(st.sampled_from(["no", "not", "a", "red", "black", "hat", "boots", "the", ",", "İ", "'"]) | st.text()))
def test_whatever_is_said_is_read_as_values_of_the_vocabulary(parts: list[str]):
    for asked in (None, "hat", "shoes_colour"):
        for facet, value in read_words(" ".join(parts), PERSON, asked).items():
            assert value in PERSON[facet]


class Reads:
    """An engine that gives one answer, and keeps what it was asked."""

    model = "reads"

    def __init__(self, text: str):
        self.text = text

    async def answer(self, subject, history, question, max_tokens, choices=None):
        self.asked = subject, history, question, max_tokens, choices
        return Answer(self.text)


def test_an_engine_gets_the_words_the_question_and_the_picture_that_was_shown():
    engine = Reads('<think>the bag?</think> {"carried": "backpack", "hat": "unknown"}')
    choices = {"carried": ("none", "backpack"), "hat": ("none", "cap")}
    words = 'no, the "bag" was darker'
    assert asyncio.run(understand(engine, SHOWN, words, choices, BAG)) == {"carried": "backpack"}
    subject, history, question, tokens, asked = engine.asked
    assert (subject.image_id, subject.said, history, tokens, asked) == (SHOWN.image_id, words, (), TOKENS, choices)
    assert question == wording(words, BAG)
    assert '"no, the \\"bag\\" was darker"' in question
    assert f'They were asked: "{BAG}"' in question
    assert "They were asked" not in wording(words)


@pytest.mark.parametrize("text", ["a red bag", '{"carried": "sofa"}', '{"carried": "none", "hat": "cap"}', "[]", ""])
def test_an_answer_outside_the_vocabulary_is_not_understood(text: str):
    assert asyncio.run(understand(Reads(text), SHOWN, "a bag", {"carried": ("none", "backpack")})) == {}


def test_the_simulated_annotator_reads_the_words_and_not_the_picture():
    engine = OracleEngine(OracleConfig(), PERSON)
    assert asyncio.run(understand(engine, SHOWN, "no, a green jacket", PERSON)) == {
        "upper_kind": "jacket",
        "upper_colour": "green",
    }
