"""Conversation in search: beliefs after answers and the best next question, by hand and against plain loops."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.search.questions import LEAST_GAIN, WORDING, beliefs, next_question, wording

Search = tuple[np.ndarray, dict[str, np.ndarray], dict[str, int], dict[str, int | None]]


def make_search(seed: int) -> Search:
    """Similarities, codes, numbers of values, and answers to some facets."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 9))
    values = {facet: int(random.integers(1, 5)) for facet in ("hat", "upper_colour", "carried", "camera")}
    codes = {facet: random.integers(-1, many, size=count) for facet, many in values.items()}
    said = [facet for facet in values if random.random() < 0.5]
    answers = {facet: None if random.random() < 0.3 else int(random.integers(values[facet])) for facet in said}
    return random.uniform(-1, 1, size=count), codes, values, answers


searches = st.integers(0, 2**32).map(make_search)


def entropy(chances: list[float]) -> float:
    return -sum(chance * math.log2(chance) for chance in chances if chance)


def likelihood(answer: int, value: int, many: int, error_rate: float) -> float:
    if many == 1:
        return 1.0
    return 1 - error_rate if answer == value else error_rate / (many - 1)


def gain_by_loops(belief: np.ndarray, codes: np.ndarray, many: int, error_rate: float) -> float:
    """H(answer) - Σ_k P(k)·H(answer | k), an image without a value answering as those with one do on average."""
    known = [k for k in range(len(belief)) if codes[k] >= 0]
    total = sum(belief[k] for k in known)
    if not total:
        return 0.0
    mean = [sum(belief[k] * likelihood(a, codes[k], many, error_rate) for k in known) / total for a in range(many)]
    rows = [
        [likelihood(a, codes[k], many, error_rate) for a in range(many)] if codes[k] >= 0 else mean
        for k in range(len(belief))
    ]
    answer = [sum(belief[k] * rows[k][a] for k in range(len(belief))) for a in range(many)]
    return entropy(answer) - sum(belief[k] * entropy(rows[k]) for k in range(len(belief)))


def test_an_answer_by_hand():
    codes = {"shoes_colour": np.array([0, 1, 2])}
    belief = beliefs(np.zeros(3), codes, {"shoes_colour": 3}, {"shoes_colour": 2}, error_rate=0.1)
    np.testing.assert_allclose(belief, [0.05, 0.05, 0.9])


def test_similarity_and_answer_by_hand():
    # Similarity makes the first image 4 times as probable, the answer the second 9 times: 4:9.
    similarity = np.array([0.2 * math.log(4), 0.0])
    belief = beliefs(similarity, {"hat": np.array([0, 1])}, {"hat": 2}, {"hat": 1}, temperature=0.2, error_rate=0.1)
    np.testing.assert_allclose(belief, [4 / 13, 9 / 13])


def test_an_image_without_a_value_answers_as_the_others_do_on_average():
    # Of the known three of four fit, each 0.9, and one does not, 0.1: the mean is 0.7, and so is the unknown one's.
    codes = {"hat": np.array([0, 0, 0, 1, -1])}
    belief = beliefs(np.zeros(5), codes, {"hat": 2}, {"hat": 0}, error_rate=0.1)
    np.testing.assert_allclose(belief, np.array([0.9, 0.9, 0.9, 0.1, 0.7]) / 3.5)
    belief = beliefs(np.zeros(5), codes, {"hat": 2}, {"hat": 1}, error_rate=0.1)
    np.testing.assert_allclose(belief, np.array([0.1, 0.1, 0.1, 0.9, 0.3]) / 1.5)


def test_an_image_that_contradicts_an_answer_falls_and_can_come_back():
    similarity, hats = np.array([1.0, 0.2]), np.array([0, 1])
    belief = beliefs(similarity, {"hat": hats}, {"hat": 2}, {"hat": 1}, temperature=0.1, error_rate=0.05)
    assert 0.5 < belief[0] < beliefs(similarity, {}, {}, {}, temperature=0.1)[0]


@settings(deadline=None)
@given(searches)
def test_beliefs_are_probabilities(search: Search):
    similarity, codes, values, answers = search
    belief = beliefs(similarity, codes, values, answers)
    assert belief.shape == similarity.shape
    assert (belief >= 0).all()
    assert belief.sum() == pytest.approx(1)


@settings(deadline=None)
@given(searches, st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(search: Search, random: Random):
    similarity, codes, values, answers = search
    order = list(range(len(similarity)))
    random.shuffle(order)
    other = {facet: facet_codes[order] for facet, facet_codes in codes.items()}
    before, after = beliefs(similarity, codes, values, answers), beliefs(similarity[order], other, values, answers)
    np.testing.assert_allclose(after, before[order], atol=1e-12)
    first, second = next_question(before, codes, values), next_question(before[order], other, values)
    assert (first is None) == (second is None)
    if first and second:
        assert first.gain == pytest.approx(second.gain)


@settings(deadline=None)
@given(searches)
def test_what_the_user_does_not_know_and_what_no_image_has_change_nothing(search: Search):
    similarity, codes, values, answers = search
    said = {facet: answer for facet, answer in answers.items() if answer is not None}
    unknown = {**codes, "hair_colour": np.full(len(similarity), -1)}
    belief = beliefs(similarity, unknown, {**values, "hair_colour": 3}, {**answers, "hair_colour": 1})
    np.testing.assert_allclose(belief, beliefs(similarity, codes, values, said), atol=1e-12)


@settings(deadline=None)
@given(searches)
def test_answers_count_in_any_order(search: Search):
    similarity, codes, values, answers = search
    backwards = dict(reversed(answers.items()))
    belief = beliefs(similarity, codes, values, backwards)
    np.testing.assert_allclose(belief, beliefs(similarity, codes, values, answers), atol=1e-12)


def test_no_candidates():
    nothing = np.zeros(0)
    assert beliefs(nothing, {"hat": np.zeros(0, int)}, {"hat": 2}, {"hat": 1}).shape == (0,)
    assert next_question(nothing, {"hat": np.zeros(0, int)}, {"hat": 2}) is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"error_rate": 0.0}, "error rate"),
        ({"error_rate": 1.0}, "error rate"),
        ({"answers": {"hat": 2}}, "hat has 2 values"),
        ({"answers": {"hat": -1}}, "hat has 2 values"),
        ({"answers": {"shoes_kind": 0}}, "shoes_kind"),
        ({"codes": {"hat": np.array([0, 2])}}, "do not fit"),
        ({"codes": {"hat": np.array([0, 1, 1])}}, "do not fit"),
    ],
)
def test_what_does_not_fit_is_an_error(changed: dict[str, object], says: str):
    given_: dict[str, object] = {
        "similarity": np.zeros(2), "codes": {"hat": np.array([0, 1])}, "values": {"hat": 2}, "answers": {"hat": 1}
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        beliefs(**{**given_, **changed})  # type: ignore[arg-type]


def test_gain_by_hand():
    # Two values, evenly: an answer tells 1 bit, less the bits of an answer that errs in a quarter of the cases.
    codes = {"hat": np.array([0, 0, 1, 1])}
    question = next_question(np.full(4, 0.25), codes, {"hat": 2}, error_rate=0.25)
    assert question is not None
    assert question.gain == pytest.approx(1 - entropy([0.25, 0.75]))
    np.testing.assert_allclose(question.shares, [0.5, 0.5])


def test_what_splits_the_candidates_is_asked_and_not_what_splits_others():
    belief = np.array([0.45, 0.45, 0.05, 0.05])
    codes = {"hat": np.array([0, 1, 0, 0]), "shoes_colour": np.array([0, 0, 1, 2])}
    question = next_question(belief, codes, {"hat": 2, "shoes_colour": 3})
    assert question is not None
    assert question.facet == "hat"
    np.testing.assert_allclose(question.shares, [0.55, 0.45])


@settings(deadline=None)
@given(searches, st.floats(0.01, 0.4))
def test_the_gain_is_that_of_plain_loops_and_the_greatest(search: Search, error_rate: float):
    similarity, codes, values, answers = search
    belief = beliefs(similarity, codes, values, answers)
    gains = {
        facet: gain_by_loops(belief, codes[facet], values[facet], error_rate) for facet in codes if facet not in answers
    }
    question = next_question(belief, codes, values, answers, error_rate=error_rate)
    if question is None:
        assert max(gains.values(), default=0.0) < LEAST_GAIN + 1e-9
    else:
        assert question.gain == pytest.approx(gains[question.facet])
        assert question.gain == pytest.approx(max(gains.values()))
        assert question.shares.sum() == pytest.approx(1)


@settings(deadline=None)
@given(searches)
def test_a_facet_that_all_share_is_never_asked(search: Search):
    similarity, _, _, _ = search
    codes = {"hat": np.full(len(similarity), 1), "carried": np.zeros(len(similarity), int)}
    assert next_question(beliefs(similarity, {}, {}, {}), codes, {"hat": 2, "carried": 1}) is None


def test_identity_split_and_what_was_asked_are_not_asked():
    each = np.arange(4)
    codes = {"identity": each, "split": each, "hat": each, "carried": np.array([0, 0, 1, 1])}
    values = {"identity": 4, "split": 4, "hat": 4, "carried": 2}
    belief, asked = np.full(4, 0.25), []
    while question := next_question(belief, codes, values, asked):
        asked.append(question.facet)
    assert asked == ["hat", "carried"]


def test_what_is_known_of_few_images_tells_little():
    codes = {"hat": np.array([0, 1, -1, -1, -1, -1, -1, -1]), "carried": np.array([0, 0, 0, 0, 0, 0, 1, 1])}
    question = next_question(np.full(8, 1 / 8), codes, {"hat": 2, "carried": 2})
    assert question is not None
    assert question.facet == "carried"


def test_a_conversation_ends_at_the_person():
    random = np.random.default_rng(0)
    codes = {name: random.integers(4, size=200) for name in ("hat", "upper_colour", "shoes_colour", "carried")}
    values, answers, person = dict.fromkeys(codes, 4), {}, 17
    similarity = random.normal(scale=0.05, size=200)
    places = []
    while True:
        belief = beliefs(similarity, codes, values, answers)
        places.append(int((belief > belief[person]).sum()))
        question = next_question(belief, codes, values, answers)
        if question is None:
            break
        answers[question.facet] = int(codes[question.facet][person])
    assert len(answers) >= 3
    assert places[-1] <= 2 < places[0]


def test_every_question_is_worded():
    assert wording("shoes_colour") == "What colour are the person's shoes?"
    assert wording("sleeve_length") == "What is the sleeve length?"
    assert all(text.endswith("?") for text in WORDING.values())
