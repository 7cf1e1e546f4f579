"""Attributes: the schema of structured answers, reading of structured answers and of free text."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceca.config import OracleConfig
from ceca.datasets.drawn import VOCABULARY
from ceca.datasets.drawn.attributes import sample_person
from ceca.dialogue.attributes import PERSON, UNKNOWN, attributes_of, json_schema, read_attributes
from ceca.dialogue.conversation import QUESTIONS, Subject
from ceca.dialogue.oracle import OracleEngine

CHOICES = {"gender": ("woman", "man"), "hat": ("none", "cap")}


def test_the_schema_allows_only_the_values_and_unknown():
    schema = json_schema(CHOICES)
    assert schema["required"] == ["gender", "hat"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["hat"]["enum"] == ["none", "cap", UNKNOWN]


def test_unknown_attributes_are_left_out():
    assert read_attributes('{"gender": "unknown", "hat": "cap"}', CHOICES) == {"hat": "cap"}


@pytest.mark.parametrize(
    "text",
    ['{"gender": "man"', '["man", "cap"]', '{"gender": "man"}', '{"gender": "man", "hat": "crown"}', "", "a man",
     '{"gender": "man", "hat": "cap", "age": "old"}', '{"gender": ["man"], "hat": "cap"}'],
)  # fmt: skip
def test_text_that_does_not_follow_the_schema_is_not_an_answer(text: str):
    assert read_attributes(text, CHOICES) is None


@given(st.fixed_dictionaries({name: st.sampled_from([*values, UNKNOWN]) for name, values in PERSON.items()}))
def test_every_answer_within_the_vocabulary_is_read(answer: dict[str, str]):
    expected = {name: value for name, value in answer.items() if value != UNKNOWN}
    assert read_attributes(json.dumps(answer), PERSON) == expected


def read(*answers: tuple[int, str]) -> dict[str, str]:
    return attributes_of([(QUESTIONS[number], answer) for number, answer in answers], PERSON)


@pytest.mark.parametrize(
    ("number", "answer", "expected"),
    [
        (0, "The person in the image is a man. His hair is short and black.",
         {"gender": "man", "hair_length": "short", "hair_colour": "black"}),
        (0, "The gender is female. She has long, blonde hair.",
         {"gender": "woman", "hair_length": "long", "hair_colour": "blond"}),
        (0, "It is a bald man.", {"gender": "man", "hair_length": "bald"}),
        (0, "The hair is short and he wears a black cap.", {"hair_length": "short"}),
        (1, "The person is wearing a black t-shirt with white stripes. The person is not wearing a hat.",
         {"hat": "none", "upper_kind": "t-shirt", "upper_colour": "black"}),
        (1, "A grey checked coat and a red baseball cap.",
         {"hat": "cap", "upper_kind": "coat", "upper_colour": "grey", "upper_pattern": "checked"}),
        (2, "The person is wearing blue denim jeans.", {"lower_kind": "jeans", "lower_colour": "blue"}),
        (2, "The person is wearing no separate lower-body garment.", {"lower_kind": "none"}),
        (3, "A pair of gray sandals.", {"shoes_kind": "sandals", "shoes_colour": "grey"}),
        (3, "The shoes are black.", {"shoes_colour": "black"}),
        (3, "White sneakers with blue laces.", {"shoes_kind": "sneakers", "shoes_colour": "white"}),
        (4, "No, the person is not holding anything in their hands.", {"carried": "none"}),
        (4, "The person holds a black handbag in the right hand.", {"carried": "handbag"}),
    ],
)  # fmt: skip
def test_attributes_are_read_from_free_text(number: int, answer: str, expected: dict[str, str]):
    assert read((number, answer)) == expected


@pytest.mark.parametrize(
    ("number", "answer", "expected"),
    [
        (1, "A black jacket over a white shirt. No hat.", {"hat": "none"}),  # unclear which garment is meant
        (1, "A black coat. It is not possible to tell whether there is a hat.",
         {"upper_kind": "coat", "upper_colour": "black"}),
        (1, "A blue and white striped shirt.", {"upper_kind": "shirt", "upper_pattern": "striped"}),
        (3, "Black and white sneakers.", {"shoes_kind": "sneakers"}),
        (3, "The person is wearing sneakers or boots.", {}),
        (3, "The shoes are not visible.", {}),
        (4, "The person is not holding anything, but has a backpack.", {}),
        (4, "The person is not holding anything other than a backpack.", {}),
        (4, "A phone and a red umbrella.", {}),
    ],
)  # fmt: skip
def test_ambiguous_text_is_not_read(number: int, answer: str, expected: dict[str, str]):
    assert read((number, answer)) == expected


def test_a_thing_is_read_only_from_the_answer_about_it():
    assert read((2, "Black jeans, and red boots."), (3, "White sneakers.")) == {
        "lower_kind": "jeans", "lower_colour": "black", "shoes_kind": "sneakers", "shoes_colour": "white"
    }  # fmt: skip
    assert attributes_of([("What is in the background?", "A man in red boots.")], PERSON) == {}


def test_another_vocabulary_is_read_in_its_own_words():
    choices = {"hat": ("none", "sun hat", "cap"), "hat_colour": ("none", "navy", "blue"), "shoes_kind": ("trainers",)}
    assert attributes_of([(QUESTIONS[1], "A navy sun hat."), (QUESTIONS[3], "Blue trainers.")], choices) == {
        "hat": "sun hat", "hat_colour": "navy", "shoes_kind": "trainers"
    }  # fmt: skip
    assert attributes_of([(QUESTIONS[1], "A shirt and no hat.")], choices) == {"hat": "none", "hat_colour": "none"}


@given(st.integers(0, 2**32))
def test_the_oracles_attributes_are_read_from_its_answers(seed: int):
    truth = asdict(sample_person(np.random.default_rng(seed)))
    engine = OracleEngine(OracleConfig(error_rate=0.0), VOCABULARY)
    answers = [asyncio.run(engine.answer(Subject("one", b"", truth), (), question, 48)).text for question in QUESTIONS]
    attributes = attributes_of(list(zip(QUESTIONS, answers, strict=True)), VOCABULARY)
    assert attributes == {name: truth[name] for name in VOCABULARY if truth[name] != "plain"}


@given(st.text(max_size=200))
def test_only_values_of_the_vocabulary_are_read(text: str):
    attributes = attributes_of([(question, text) for question in QUESTIONS], PERSON)
    assert all(value in PERSON[name] for name, value in attributes.items())
