"""Oracle: a simulated annotator with the configured error rate, which says that it is simulated."""

import asyncio
import logging
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.config import OracleConfig
from ceca.datasets.drawn import VOCABULARY
from ceca.datasets.drawn.attributes import sample_person
from ceca.datasets.drawn.body import VIEWS
from ceca.dialogue.conversation import (
    QUESTIONS,
    SUMMARY_REQUEST,
    Dialogue,
    DialogueError,
    EngineError,
    Subject,
    View,
    converse,
)
from ceca.dialogue.oracle import HIDDEN, OracleEngine, majority
from ceca.dialogue.phrases import read_summary, write_answers, write_summary

WOMAN = {
    "gender": "woman", "hair_length": "long", "hair_colour": "brown", "hat": "cap", "hat_colour": "orange",
    "upper_kind": "shirt", "upper_colour": "red", "upper_pattern": "striped",
    "lower_kind": "trousers", "lower_colour": "navy", "lower_pattern": "plain",
    "shoes_kind": "boots", "shoes_colour": "black", "carried": "umbrella", "carried_colour": "yellow",
}  # fmt: skip
DRESS = {
    **WOMAN, "upper_kind": "dress", "lower_kind": "none", "lower_colour": "none", "lower_pattern": "none",
    "hat": "none", "hat_colour": "none", "carried": "none", "carried_colour": "none",
}  # fmt: skip
BALD = {**WOMAN, "gender": "man", "hair_length": "bald", "hair_colour": "none"}

people = st.integers(0, 2**32).map(lambda seed: asdict(sample_person(np.random.default_rng(seed))))


def talk(attributes: dict[str, str], image_id: str = "one", *, error_rate: float = 0.0, seed: int = 0) -> Dialogue:
    engine = OracleEngine(OracleConfig(error_rate=error_rate, seed=seed), VOCABULARY)
    subject = Subject(image_id, b"", attributes)
    return asyncio.run(converse(engine, subject, questions=5, answer_tokens=48, summary_tokens=128))


def talk_of_view(view: str | None, questions: int = 5) -> Dialogue:
    """Dialogue about WOMAN. The annotator is wrong in every attribute that the view hides, and right otherwise."""
    engine = OracleEngine(OracleConfig(error_rate=0.0, hidden_error_rate=1.0), VOCABULARY)
    subject = Subject("one", b"", WOMAN, view)
    return asyncio.run(converse(engine, subject, questions=questions, answer_tokens=48, summary_tokens=128))


def test_attributes_hidden_in_a_view_have_their_own_error_rate():
    truth = reported(talk(WOMAN))
    assert reported(talk_of_view(None)) == truth
    back, right = reported(talk_of_view("back")), reported(talk_of_view("right"))
    assert {name for name in truth if back[name] != truth[name]} == {"gender", "upper_kind"}
    assert {name for name in truth if right[name] != truth[name]} == {"shoes_colour"}


def test_every_view_hides_something_that_another_shows():
    assert set(HIDDEN) == set(VIEWS)
    assert all(set(names) <= set(VOCABULARY) for names in HIDDEN.values())
    assert not set.intersection(*map(set, HIDDEN.values()))


def test_a_summary_holds_only_the_answers_if_questions_were_left_out():
    dialogue = talk_of_view(None, questions=2)
    assert dialogue.summary == " ".join(turn.answer for turn in dialogue.turns)
    assert "shoes" not in dialogue.summary


def text_of(dialogue: Dialogue) -> str:
    return " ".join([*(turn.answer for turn in dialogue.turns), dialogue.summary])


def reported(dialogue: Dialogue) -> dict[str, str]:
    """Values that the answers report, for attributes with unambiguous words."""
    gender, upper, _, shoes, _ = (turn.answer for turn in dialogue.turns)
    kinds = sorted(VOCABULARY["upper_kind"], key=len, reverse=True)  # longest first: a t-shirt is not a shirt
    return {
        "gender": "woman" if "a woman" in gender else "man",
        "upper_kind": next(kind for kind in kinds if f"{kind} and" in upper),
        "shoes_kind": next(kind for kind in VOCABULARY["shoes_kind"] if shoes.endswith(f"{kind}.")),
        "shoes_colour": shoes.split()[4],
    }


def test_each_question_gets_its_answer():
    assert [turn.answer for turn in talk(WOMAN).turns] == [
        "The person is a woman with long brown hair.",
        "The person is wearing a red striped shirt and an orange cap.",
        "The person is wearing navy trousers.",
        "The person is wearing black boots.",
        "The person is carrying a yellow umbrella.",
    ]


def test_answers_mention_missing_things_too():
    assert [turn.answer for turn in talk(DRESS).turns][1:] == [
        "The person is wearing a red striped dress and no hat.",
        "The person is wearing no separate lower-body garment.",
        "The person is wearing black boots.",
        "The person is carrying nothing.",
    ]
    assert talk(BALD).turns[0].answer == "The person is a man with no hair."


@given(person=people, image_id=st.text(min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_summary_mentions_everything_in_at_most_three_short_sentences(person, image_id):
    summary = talk(person, image_id).summary
    for name, value in person.items():
        assert value in ("none", "bald", "plain") or value in summary, f"{name} is missing"
    assert len(summary.split()) < 60
    assert 1 <= summary.count(".") <= 3
    assert "none" not in summary
    assert "  " not in summary


def test_a_summary_fits_into_clips_77_tokens():
    from ceca.model.tokens import CONTEXT, count_tokens

    longest = {name: max(values, key=len) for name, values in VOCABULARY.items()}
    assert max(count_tokens(talk(longest, f"image {number}").summary) for number in range(12)) <= CONTEXT


def test_summaries_come_in_several_forms():
    assert len({talk(WOMAN, f"image {number}").summary for number in range(30)}) == 3


# --- errors -----------------------------------------------------------------------------------------------


def test_without_errors_every_answer_is_true():
    for number in range(20):
        person = asdict(sample_person(np.random.default_rng(number)))
        seen = reported(talk(person, f"image {number}"))
        assert seen == {name: person[name] for name in seen}


def test_a_second_run_gives_the_same_dialogue():
    assert talk(WOMAN, error_rate=0.5) == talk(WOMAN, error_rate=0.5)


def test_another_seed_or_image_gives_other_errors():
    first = text_of(talk(WOMAN, error_rate=0.5))
    assert first != text_of(talk(WOMAN, error_rate=0.5, seed=1))
    assert first != text_of(talk(WOMAN, "two", error_rate=0.5))


def test_attributes_err_at_the_configured_rate():
    wrong = {"gender": 0, "upper_kind": 0, "shoes_kind": 0, "shoes_colour": 0}
    for number in range(200):
        for name, value in reported(talk(WOMAN, f"image {number}", error_rate=0.2)).items():
            wrong[name] += value != WOMAN[name]
    # 200 draws at rate 0.2: mean 40, standard deviation 5.7
    assert all(18 <= count <= 62 for count in wrong.values()), wrong


@given(person=people, image_id=st.text(min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_answers_and_summary_agree_even_if_they_are_wrong(person, image_id):
    dialogue = talk(person, image_id, error_rate=0.5)
    stock = {"The", "person", "is", "wearing", "carrying", "a", "an", "and", "with", "no"}
    stock |= {"separate", "lower-body", "garment"}  # answer for a dress
    answered = {word.strip(".") for turn in dialogue.turns for word in turn.answer.split()} - stock
    assert answered <= {word.strip(".,") for word in dialogue.summary.split()}


@given(person=people)
@settings(max_examples=50, deadline=None)
def test_a_wrongly_reported_thing_has_a_colour(person):
    assert "none" not in text_of(talk(person, error_rate=1.0))


# --- common summaries of several views --------------------------------------------------------------------


def test_most_views_are_believed_and_those_that_hardly_show_a_thing_less():
    said = [
        {"gender": "man", "hat": "cap", "hat_colour": "red", "shoes_kind": "boots", "carried": "none"},
        {"gender": "woman", "hat": "none", "hat_colour": "none", "shoes_kind": "trainers", "carried": "book"},
        {"gender": "woman", "hat": "cap", "hat_colour": "blue", "carried": "none"},
        {"gender": "woman", "hat": "cap", "hat_colour": "blue", "shoes_kind": "trainers", "carried": "none"},
    ]
    hidden = [("shoes_kind",), ("carried",), ("gender", "hat_colour"), ("gender", "hat_colour", "shoes_kind")]
    # gender: man 1, woman 1 + 1/4 + 1/4; hat: cap 3, none 1; its colour: red 1, blue 1/4 + 1/4, and no vote for none;
    # shoes: boots 1/4, trainers 1 + 1/4; carried: none 3, book 1/4.
    agreed = {"gender": "woman", "hat": "cap", "hat_colour": "red", "shoes_kind": "trainers", "carried": "none"}
    assert majority(said, hidden) == agreed
    assert majority(said[:1] + said[2:3], [(), ()])["gender"] == "man"  # one each: the first
    assert majority([{"hat": "cap", "hat_colour": "red"}, *[{"hat": "none", "hat_colour": "none"}] * 2], [()] * 3) == {
        "hat": "none",
        "hat_colour": "none",
    }


def agree(*views: View, attributes: dict[str, str] | None = None) -> str:
    engine = OracleEngine(OracleConfig(error_rate=0.0), VOCABULARY)
    return asyncio.run(engine.answer(Subject("one", b"", attributes, views=views), (), "?", 128)).text


def test_views_that_hide_different_things_give_the_person_as_she_is():
    views = [View(talk_of_view(view).summary, view) for view in VIEWS]
    assert len({view.summary for view in views}) == 4
    assert read_summary(agree(*views), VOCABULARY) == WOMAN


def test_the_truth_does_not_change_what_views_agree_on():
    wrong = [View(talk_of_view("back").summary, "back")] * 2
    text = agree(*wrong)
    assert read_summary(text, VOCABULARY) == read_summary(wrong[0].summary, VOCABULARY) != WOMAN
    assert agree(*wrong, attributes=WOMAN) == agree(*wrong, attributes=BALD) == text


def test_what_no_view_was_asked_about_is_not_in_the_common_summary():
    views = [View(talk_of_view(view, questions=2).summary, view) for view in VIEWS]
    assert agree(*views) == "The person is a woman with long brown hair. " + (
        "The person is wearing a red striped shirt and an orange cap."
    )
    assert agree(View("Somebody.")) == ""


@given(person=people, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_summary_and_answers_are_read_as_they_were_written(person, seed):
    told = dict(person)
    for thing, colour in (("hair_length", "hair_colour"), ("hat", "hat_colour"), ("carried", "carried_colour")):
        told[colour] = "none" if told[thing] in ("none", "bald") else told[colour]
    assert read_summary(write_summary(person, np.random.default_rng(seed)), VOCABULARY) == told
    assert read_summary(" ".join(write_answers(person)), VOCABULARY) == told


# --- start and missing attributes -------------------------------------------------------------------------


def test_the_oracle_says_that_it_is_simulated(caplog):
    engine = OracleEngine(OracleConfig(error_rate=0.05), VOCABULARY)
    with caplog.at_level(logging.INFO):
        asyncio.run(engine.start())
    assert "simulated annotator" in engine.model
    assert "simulated annotator" in caplog.text
    assert "5 %" in caplog.text


def test_a_dataset_without_attributes_is_refused_at_the_start():
    with pytest.raises(EngineError, match="has none; choose --engine vllm or --engine openai"):
        asyncio.run(OracleEngine(OracleConfig(), {}).start())


def test_only_the_image_without_attributes_is_rejected():
    engine = OracleEngine(OracleConfig(), VOCABULARY)
    for question in (QUESTIONS[0], SUMMARY_REQUEST):
        with pytest.raises(DialogueError) as caught:
            asyncio.run(engine.answer(Subject("one", b""), (), question, 48))
        assert caught.value.reason == "no_attributes"
