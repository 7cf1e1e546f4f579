"""Texts of the simulated annotator: written from what it saw of a person, and read again."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ceca.datasets.drawn.captions import PLURAL, with_article
from ceca.dialogue.attributes import Choices

_ANSWERS = (  # to the five questions
    "The person is a {who} with {hair}.",
    "The person is wearing {upper} and {hat}.",
    "The person is wearing {lower}.",
    "The person is wearing {shoes}.",
    "The person is carrying {carried}.",
)
_SUMMARIES = (  # a wording, and what stands in it between the clothes of the upper and the lower body
    ("A {who} with {hair} wearing {clothes} and {shoes}. {pronoun} carries {carried} and wears {hat}.", ", "),
    (
        "The {who} has {hair}, is dressed in {clothes}, and wears {shoes} and {hat}. {pronoun} holds {carried}.",
        " with ",
    ),
    (
        "The person is a {who} with {hair} and {hat}, in {clothes}. The shoes are {shoes}. "
        "{pronoun} is carrying {carried}.",
        " and ",
    ),
)
_ATTRIBUTES = {  # of each phrase
    "who": ("gender",),
    "hair": ("hair_length", "hair_colour"),
    "hat": ("hat", "hat_colour"),
    "upper": ("upper_kind", "upper_colour", "upper_pattern"),
    "lower": ("lower_kind", "lower_colour", "lower_pattern"),
    "shoes": ("shoes_kind", "shoes_colour"),
    "carried": ("carried", "carried_colour"),
}
_NO_LOWER = "no separate lower-body garment"  # of a dress
_NOTHING: dict[str, tuple[str, ...]] = {
    "no hair": ("bald", "none"),
    "no hat": ("none", "none"),
    _NO_LOWER: ("none", "none", "none"),
    "nothing": ("none", "none"),
}


def write_answers(seen: Mapping[str, str]) -> tuple[str, ...]:
    """The answers to the five questions.

    Args:
        seen: attribute → value, of all attributes.
    """
    phrases = _phrases(seen)
    return tuple(answer.format_map(phrases) for answer in _ANSWERS)


def write_summary(seen: Mapping[str, str], random: np.random.Generator) -> str:
    """A summary in one of three wordings. If attributes are missing: the answers that need none of them.

    Args:
        seen: attribute → value.
        random: chooses the wording.
    """
    unknown = {part for part, attributes in _ATTRIBUTES.items() if not seen.keys() >= set(attributes)}
    if unknown:
        whole = {name: "none" for attributes in _ATTRIBUTES.values() for name in attributes} | dict(seen)
        answers = zip(_ANSWERS, write_answers(whole), strict=True)
        return " ".join(answer for wording, answer in answers if unknown.isdisjoint(_parts(wording)))
    phrases = _phrases(seen)
    wording, between = _SUMMARIES[int(random.integers(len(_SUMMARIES)))]
    worn = [phrases["upper"], *([] if phrases["lower"] == _NO_LOWER else [phrases["lower"]])]
    return wording.format_map({**phrases, "clothes": between.join(worn)})


def read_summary(summary: str, vocabulary: Choices) -> dict[str, str]:
    """Read what a summary says: attribute → value; empty if the simulated annotator did not write it.

    Args:
        summary: the summary.
        vocabulary: attribute → its values; tells a pattern from a kind.
    """
    for wording, between in _SUMMARIES:
        if found := _pattern(wording).fullmatch(summary):
            parts = found.groupdict()
            upper, _, lower = parts["clothes"].partition(between)
            return _read_phrases({**parts, "upper": upper, "lower": lower or _NO_LOWER}, vocabulary)
    said: dict[str, str] = {}
    for wording, sentence in zip(_ANSWERS, re.split(r"(?<=\.) ", summary), strict=False):
        found = _pattern(wording).fullmatch(sentence)
        said |= found.groupdict() if found else {}
    return _read_phrases(said, vocabulary)


def _phrases(seen: Mapping[str, str]) -> dict[str, str]:
    gender = seen["gender"]

    def thing(name: str) -> str:
        return with_article(f"{seen[f'{name}_colour']} {seen[name]}")

    def garment(name: str) -> str:
        kind, colour, pattern = (seen[f"{name}_{part}"] for part in ("kind", "colour", "pattern"))
        words = f"{colour} {'' if pattern == 'plain' else f'{pattern} '}{kind}".strip()
        return words if kind in PLURAL else with_article(words)

    return {
        "who": gender,
        "pronoun": {"woman": "She", "man": "He", "female": "She", "male": "He"}.get(gender, "The person"),
        "hair": "no hair" if seen["hair_length"] == "bald" else f"{seen['hair_length']} {seen['hair_colour']} hair",
        "upper": garment("upper"),
        "hat": "no hat" if seen["hat"] == "none" else thing("hat"),
        "lower": _NO_LOWER if seen["lower_kind"] == "none" else garment("lower"),
        "shoes": f"{seen['shoes_colour']} {seen['shoes_kind']}",
        "carried": "nothing" if seen["carried"] == "none" else thing("carried"),
    }


def _read_phrases(phrases: Mapping[str, str], vocabulary: Choices) -> dict[str, str]:
    seen: dict[str, str] = {}
    for part, attributes in _ATTRIBUTES.items():
        if part in phrases:
            seen |= zip(attributes, _read_phrase(part, phrases[part], vocabulary), strict=True)
    return seen


def _read_phrase(part: str, phrase: str, vocabulary: Choices) -> Sequence[str]:
    """Values of a phrase's attributes."""
    if part == "who":
        return (phrase,)
    if phrase in _NOTHING:
        return _NOTHING[phrase]
    first, _, rest = re.sub(r"^an? ", "", phrase).partition(" ")
    if part == "hair":
        return first, rest.removesuffix(" hair")
    if part not in ("upper", "lower"):
        return rest, first
    pattern, _, kind = rest.partition(" ")
    return (kind, first, pattern) if pattern in vocabulary[f"{part}_pattern"] else (rest, first, "plain")


def _parts(wording: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", wording)


@functools.cache
def _pattern(wording: str) -> re.Pattern[str]:
    """A pattern that takes a wording's phrases out of a text."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(wording)))
