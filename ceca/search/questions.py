"""Which question to ask next about a person who is searched for, and what an answer makes of the candidates.

A candidate is an image; its facets have one value each or none, as small numbers (-1: none). An answer narrows the
search softly, for an image's value may be wrong: a candidate that contradicts an answer falls and does not vanish. The
next question is the one whose answer is expected to tell most about which candidate it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

TEMPERATURE = 0.1  # of similarities, chosen with the error rate by benchmarks/questions.py
ERROR_RATE = 0.05  # chance that an answer and the image's value differ though it is the person
LEAST_GAIN = 0.05  # bits; a question that is expected to tell less is not asked

NEVER_ASKED = frozenset({"identity", "split"})  # of the dataset, and not of what a person saw

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
    """The facet to ask about, the share of the belief that each of its values has ([V], sums to 1), and bits gained."""

    facet: str
    shares: np.ndarray
    gain: float


def wording(facet: str) -> str:
    """The question as a person is asked it."""
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
    """How probable each candidate is, [K], summing to 1: softmax(similarity/temperature + Σ log P(answer | value)).

    With e the error rate and V values, P(answer | value) is 1-e where they are the same and e/(V-1) where not. An image
    without a value is taken to be like those with one: its P is their mean, weighted by what similarity alone makes
    probable, so that it neither gains nor loses against them as a whole. (1/V would raise it when an answer is rare.)

    Args:
        similarity: [K]. codes: of each facet [K] whole numbers below its `values`, -1 where an image has none.
        answers: the code that a facet was answered with; None (the user does not know) changes nothing.
        temperature: over 0. error_rate: between 0 and 1, neither of them.

    Raises:
        ValueError: one of these does not hold, or an answer is about a facet that is not in `codes`.
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
        found, count = _checked(codes[facet], values[facet], len(logits), facet), values[facet]
        if not 0 <= answer < count:
            raise ValueError(f"{facet} has {count} values, found the answer {answer}")
        chance = _chances(count, error_rate)[answer]
        known = found >= 0
        mass = prior[known].sum()
        mean = (prior[known] @ chance[found[known]]) / mass if mass > 0 else 1 / count
        evidence += np.log(np.where(known, chance[found], mean))
    return _softmax(logits + evidence)


def next_question(
    beliefs: np.ndarray,
    codes: Mapping[str, np.ndarray],
    values: Mapping[str, int],
    asked: Collection[str] = (),
    *,
    error_rate: float = ERROR_RATE,
) -> Question | None:
    """The facet whose answer tells most about which candidate it is, or None where none tells `LEAST_GAIN` bits.

    That is the mutual information of the answer, errors and all, and the candidate:
    H(answer) - Σ_k beliefs_k·H(answer | candidate k). An image without a value tells nothing (`beliefs`). Of facets
    that tell the same the first by name is asked; those `asked` already, identity and split are not asked.

    Args:
        beliefs: [K], summing to 1. codes, values, error_rate: as of `beliefs`.

    Raises:
        ValueError: codes do not fit.
    """
    best: Question | None = None
    for facet in sorted(set(codes) - set(asked) - NEVER_ASKED):
        found, count = _checked(codes[facet], values[facet], len(beliefs), facet), values[facet]
        known = found >= 0
        mass = np.bincount(found[known], np.asarray(beliefs, np.float64)[known], minlength=count)
        total = float(mass.sum())
        if count < 2 or not total > 0:
            continue
        shares = mass / total
        chance = _chances(count, error_rate)
        # Images without a value answer as the others do on average, so that the gain is the others' alone; and what is
        # left to doubt when the image is known is the same for every value.
        gain = total * (_bits(shares @ chance) - _bits(chance[0]))
        if gain >= LEAST_GAIN and (best is None or gain > best.gain + 1e-12):
            best = Question(facet, shares, gain)
    return best


def _chances(count: int, error_rate: float) -> np.ndarray:
    """P(answer | value) of a facet, [V answers, V values]; symmetric, so that each row and each column sums to 1."""
    if not 0 < error_rate < 1:
        raise ValueError(f"the error rate must be between 0 and 1, found {error_rate}")
    if count == 1:
        return np.ones((1, 1))
    chances = np.full((count, count), error_rate / (count - 1))
    np.fill_diagonal(chances, 1 - error_rate)
    return chances


def _checked(codes: np.ndarray, count: int, candidates: int, facet: str) -> np.ndarray:
    if codes.shape != (candidates,) or (candidates and not -1 <= codes.min() <= codes.max() < count):
        raise ValueError(f"{facet} has {count} values; {candidates} codes from -1 to {count - 1} do not fit {codes!r}")
    return codes


def _softmax(logits: np.ndarray) -> np.ndarray:
    if not len(logits):
        return logits
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _bits(chances: np.ndarray) -> float:
    """Entropy."""
    return float(-(chances * np.log2(chances)).sum())
