"""Structured answers: the schema that decoding follows, and what is read of an answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceca.dialogue.attributes import PERSON, UNKNOWN, json_schema, read_attributes

CHOICES = {"gender": ("woman", "man"), "hat": ("none", "cap")}


def test_the_schema_allows_each_value_and_unknown_and_nothing_else():
    schema = json_schema(CHOICES)
    assert schema["required"] == ["gender", "hat"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["hat"]["enum"] == ["none", "cap", UNKNOWN]


def test_what_is_unknown_is_left_out():
    assert read_attributes('{"gender": "unknown", "hat": "cap"}', CHOICES) == {"hat": "cap"}


@pytest.mark.parametrize(
    "text",
    ['{"gender": "man"', '["man", "cap"]', '{"gender": "man"}', '{"gender": "man", "hat": "crown"}', "", "a man",
     '{"gender": "man", "hat": "cap", "age": "old"}', '{"gender": ["man"], "hat": "cap"}'],
)  # fmt: skip
def test_what_does_not_follow_the_schema_is_no_answer(text: str):
    assert read_attributes(text, CHOICES) is None


@given(st.fixed_dictionaries({name: st.sampled_from([*values, UNKNOWN]) for name, values in PERSON.items()}))
def test_every_answer_within_the_vocabulary_is_read(answer: dict[str, str]):
    expected = {name: value for name, value in answer.items() if value != UNKNOWN}
    assert read_attributes(json.dumps(answer), PERSON) == expected
