"""Verdicts: what a description states, and what an engine says of an image about one of its claims."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.config import OracleConfig
from ceca.datasets.drawn import VOCABULARY
from ceca.datasets.drawn.attributes import sample_person
from ceca.datasets.drawn.body import VIEWS
from ceca.datasets.drawn.captions import describe
from ceca.dialogue.attributes import PERSON
from ceca.dialogue.conversation import Answer, DialogueError, Subject
from ceca.dialogue.oracle import OracleEngine
from ceca.dialogue.verdicts import NAMES, Claim, judge, stated, wording


class Says:
    """An engine that gives one answer, and keeps what it was asked."""

    model = "says"

    def __init__(self, text: str):
        self.text = text
        self.asked: list[tuple[object, ...]] = []

    async def answer(self, subject, history, question, max_tokens, choices=None):
        self.asked.append((history, question, choices))
        return Answer(self.text)


def oracle(error_rate: float = 0.0) -> OracleEngine:
    return OracleEngine(OracleConfig(error_rate=error_rate), VOCABULARY)


def verdict(engine: object, subject: Subject, attribute: str, value: str) -> str:
    return asyncio.run(judge(engine, subject, Claim(attribute, value)))


def person(seed: int) -> dict[str, str]:
    return asdict(sample_person(np.random.default_rng(seed)))


# --- what a description states ----------------------------------------------------------------------------


def test_a_description_states_attributes_of_several_things():
    text = "A woman with long blonde hair wears a red striped shirt, dark blue trousers and white boots. No hat."
    assert stated(text, PERSON) == (
        ("gender", "woman"), ("hair_length", "long"), ("hair_colour", "blond"), ("hat", "none"),
        ("upper_kind", "shirt"), ("upper_colour", "red"), ("upper_pattern", "striped"),
        ("lower_kind", "trousers"), ("lower_colour", "blue"), ("shoes_kind", "boots"), ("shoes_colour", "white"),
    )  # fmt: skip


def test_a_word_before_a_verb_belongs_to_another_thing():
    text = "This gentleman with short black hair wears trousers."
    assert stated(text, PERSON) == (
        ("gender", "man"), ("hair_length", "short"), ("hair_colour", "black"), ("lower_kind", "trousers"),
    )  # fmt: skip


def test_what_a_description_leaves_out_or_leaves_open_is_not_stated():
    assert stated("A person walks by. The shoes may be black.", PERSON) == ()


@given(st.integers(0, 2**32), st.sampled_from(sorted(VIEWS)))
@settings(max_examples=60)
def test_what_captions_of_drawn_people_state_is_true(seed: int, view: str):
    source = np.random.default_rng(seed)
    drawn = sample_person(source)
    for attribute, value in stated(describe(drawn, view, source), VOCABULARY):
        assert getattr(drawn, attribute) == value


# --- asking an engine -------------------------------------------------------------------------------------


def test_the_question_names_the_claim_and_the_answers_that_the_schema_allows():
    engine = Says('{"upper_colour": "red"}')
    assert verdict(engine, Subject("one", b""), "upper_colour", "red") == "fits"
    ((history, question, choices),) = engine.asked
    assert history == ()  # the image comes first in each prompt, and only the end of prompts differs
    assert choices == {"upper_colour": ("red", "not red")}
    assert question == (
        "Look at the colour of the clothes on the upper body: is it 'red'? Answer with 'red' or 'not red' as JSON, "
        "with 'unknown' if it cannot be seen."
    )
    assert wording(Claim("left_sock", "grey")).startswith("Look at the left sock: is it 'grey'?")
    assert NAMES.keys() >= VOCABULARY.keys() | PERSON.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"hat": "cap"}', "fits"),
        ('<think>A cap? No.</think> {"hat": "not cap"}', "differs"),
        ('{"hat": "unknown"}', "unseen"),
        ('{"hat": "beanie"}', "unseen"),
        ("a cap", "unseen"),
        ("", "unseen"),
    ],
)
def test_an_answer_that_does_not_follow_the_schema_says_nothing(text: str, expected: str):
    assert verdict(Says(text), Subject("one", b""), "hat", "cap") == expected


def test_an_image_that_the_engine_cannot_look_at_has_no_verdict():
    with pytest.raises(DialogueError):
        verdict(oracle(), Subject("one", b""), "hat", "cap")


@given(st.integers(0, 2**32), st.sampled_from(sorted(VOCABULARY)), st.data())
@settings(max_examples=30)
def test_a_simulated_annotator_without_errors_knows_what_fits(seed: int, attribute: str, data: st.DataObject):
    truth = person(seed)
    value = data.draw(st.sampled_from(VOCABULARY[attribute]))
    expected = "fits" if truth[attribute] == value else "differs"
    assert verdict(oracle(), Subject("one", b"", truth), attribute, value) == expected
    assert verdict(oracle(), Subject("one", b"", truth), "age", "old") == "unseen"


def test_a_simulated_annotator_errs_at_its_rate_and_always_in_the_same_way():
    truth = person(0)
    subjects = [Subject(f"image {number}", b"", truth) for number in range(200)]
    said = [verdict(oracle(0.3), subject, "upper_colour", truth["upper_colour"]) for subject in subjects]
    assert said == [verdict(oracle(0.3), subject, "upper_colour", truth["upper_colour"]) for subject in subjects]
    assert 40 <= said.count("differs") <= 80  # mean 60, standard deviation 6.5
    assert said.count("unseen") == 0
