"""Conversation in search: how probable each candidate is after answers, and the best next question.

A candidate is an image. Each of its facets has one value, given as a code from 0, or none (-1). Because an image's
value may be wrong, an answer narrows the search softly: a candidate that contradicts an answer becomes less probable
and is not excluded. The next question is the one with the largest expected information about the candidate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

TEMPERATURE = 0.1  # of similarities; chosen together with the error rate by benchmarks/questions.py
ERROR_RATE = 0.05  # chance that the answer differs from the image's value, although the image shows the person
LEAST_GAIN = 0.05  # in bits; a question with a smaller expected gain is not asked

NEVER_ASKED = frozenset({"identity", "split"})  # properties of the dataset that nobody saw

WORDING = {
    "gender": "Is the person a man or a woman?",
    "hair_length": "How long is the person's hair?",
    "hair_colour": "What colour is the person's hair?",
    "hat": "What kind of hat is the person wearing, if any?",
    "hat_colour": "What colour is the person's hat, if there is one?",
    "upper_kind": "What is the person wearing on the upper body?",
    "upper_colour": "What colour are the clothes on the upper body?",
    "upper_pattern": "What pattern do the clothes on the upper body have?",
    "lower_kind": "What is the person wearing on the lower body?",
    "lower_colour": "What colour are the clothes on the lower body?",
    "lower_pattern": "What pattern do the clothes on the lower body have?",
    "shoes_kind": "What kind of shoes is the person wearing?",
    "shoes_colour": "What colour are the person's shoes?",
    "carried": "What is the person carrying, if anything?",
    "carried_colour": "What colour is the thing that the person is carrying, if there is one?",
    "camera": "Which camera saw the person?",
}


class Question(NamedTuple):
    """A question: its facet, the belief in each value of the facet ([V], sums to 1), and the expected gain in bits."""

    facet: str
    shares: np.ndarray
    gain: float


def wording(facet: str) -> str:
    """Text of the question about a facet."""
    return WORDING.get(facet) or f"What is the {facet.replace('_', ' ')}?"


def beliefs(
    similarity: np.ndarray,
    codes: Mapping[str, np.ndarray],
    values: Mapping[str, int],
    answers: Mapping[str, int | None],
    *,
    temperature: float = TEMPERATURE,
    error_rate: float = ERROR_RATE,
) -> np.ndarray:
    """Compute how probable each candidate is: softmax(similarity/temperature + Σ log P(answer | value)).

    With error rate e and V values, P(answer | value) is 1-e if they are equal, else e/(V-1). For an image without a
    value, P is the mean over the images that have one, weighted by the probabilities from similarity alone. So it
    neither gains nor loses against them as a whole; with P = 1/V it would gain from a rare answer.

    Args:
        similarity: [K] similarities of the candidates.
        codes: facet → [K] codes from 0 to V-1; -1 if an image has no value.
        values: facet → its number of values V.
        answers: facet → code of the answer; None (the user does not know) changes nothing.
        temperature: temperature of the softmax, above 0.
        error_rate: e, above 0 and below 1.

    Returns:
        [K] probabilities, which sum to 1.

    Raises:
        ValueError: an argument is out of its range, or an answer is about a facet that is not in `codes`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be over 0, found {temperature}")
    logits = np.asarray(similarity, np.float64) / temperature
    prior, evidence = _softmax(logits), np.zeros_like(logits)
    for facet, answer in answers.items():
        if facet not in codes:
            raise ValueError(f"an answer about {facet!r}, and the candidates have {', '.join(codes) or 'no facets'}")
        if answer is None:
            continue
        count = values[facet]
        facet_codes = _checked(codes[facet], count, len(logits), facet)
        if not 0 <= answer < count:
            raise ValueError(f"{facet} has {count} values, found the answer {answer}")
        chance = _chances(count, error_rate)[answer]
        known = facet_codes >= 0
        mass = prior[known].sum()
        mean = (prior[known] @ chance[facet_codes[known]]) / mass if mass > 0 else 1 / count
        evidence += np.log(np.where(known, chance[facet_codes], mean))
    return _softmax(logits + evidence)


def next_question(
    beliefs: np.ndarray,
    codes: Mapping[str, np.ndarray],
    values: Mapping[str, int],
    asked: Collection[str] = (),
    *,
    error_rate: float = ERROR_RATE,
) -> Question | None:
    """Choose the facet whose answer tells most about the candidate.

    The gain is the mutual information between the answer, errors included, and the candidate:
    H(answer) - Σ_k beliefs_k·H(answer | candidate k). An image without a value adds nothing to it. Between facets of
    equal gain the first by name is chosen. Identity and split are never asked.

    Args:
        beliefs: [K] probabilities, which sum to 1.
        codes: as in `beliefs`.
        values: as in `beliefs`.
        asked: facets that were asked already.
        error_rate: as in `beliefs`.

    Returns:
        The question; None if no facet gains `LEAST_GAIN` bits.

    Raises:
        ValueError: codes do not fit their facet's number of values.
    """
    best: Question | None = None
    for facet in sorted(set(codes) - set(asked) - NEVER_ASKED):
        count = values[facet]
        facet_codes = _checked(codes[facet], count, len(beliefs), facet)
        known = facet_codes >= 0
        mass = np.bincount(facet_codes[known], np.asarray(beliefs, np.float64)[known], minlength=count)
        total = float(mass.sum())
        if count < 2 or not total > 0:
            continue
        shares = mass / total
        chance = _chances(count, error_rate)
        # Images without a value answer like the average of the others, so only the others add to the gain. The
        # entropy of the answer for a known image is the same for every value, so the first row stands for all.
        gain = total * (_bits(shares @ chance) - _bits(chance[0]))
        if gain >= LEAST_GAIN and (best is None or gain > best.gain + 1e-12):
            best = Question(facet, shares, gain)
    return best


def _chances(count: int, error_rate: float) -> np.ndarray:
    """P(answer | value) for a facet of V values: [V answers, V values]; each row and each column sums to 1."""
    if not 0 < error_rate < 1:
        raise ValueError(f"the error rate must be between 0 and 1, found {error_rate}")
    if count == 1:
        return np.ones((1, 1))
    chances = np.full((count, count), error_rate / (count - 1))
    np.fill_diagonal(chances, 1 - error_rate)
    return chances


def _checked(codes: np.ndarray, count: int, candidates: int, facet: str) -> np.ndarray:
    """The codes, if there is one per candidate and each is from -1 to count - 1."""
    if codes.shape != (candidates,) or (candidates and not -1 <= codes.min() <= codes.max() < count):
        raise ValueError(f"{facet} has {count} values; {candidates} codes from -1 to {count - 1} do not fit {codes!r}")
    return codes


def _softmax(logits: np.ndarray) -> np.ndarray:
    if not len(logits):
        return logits
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _bits(chances: np.ndarray) -> float:
    """Entropy in bits."""
    return float(-(chances * np.log2(chances)).sum())
