"""Structured answers: attributes with a vocabulary, asked for besides free text, for filters in search."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ceca.data.store import Store

Choices = Mapping[str, Sequence[str]]  # attribute → the values it can have

UNKNOWN = "unknown"

_COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "beige")

# What people who describe pedestrians mention most; a dataset with a vocabulary of its own is asked by that.
PERSON: Choices = {
    "gender": ("woman", "man"),
    "hair_length": ("bald", "short", "shoulder-length", "long"),
    "hair_colour": ("black", "brown", "blond", "grey", "red"),
    "hat": ("none", "cap", "beanie", "brimmed hat", "hood", "helmet"),
    "upper_kind": ("t-shirt", "shirt", "sweater", "jacket", "coat", "dress", "vest", "suit"),
    "upper_colour": _COLOURS,
    "upper_pattern": ("plain", "striped", "checked", "dotted", "printed"),
    "lower_kind": ("trousers", "jeans", "shorts", "skirt", "leggings", "none"),
    "lower_colour": _COLOURS,
    "shoes_kind": ("sneakers", "leather shoes", "boots", "sandals", "high heels"),
    "shoes_colour": _COLOURS,
    "carried": ("none", "handbag", "shoulder bag", "backpack", "suitcase", "shopping bag", "umbrella", "phone"),
}


def json_schema(choices: Choices) -> dict[str, Any]:
    """The schema that guided decoding follows: every attribute is one of its values or unknown."""
    return {
        "type": "object",
        "properties": {name: {"type": "string", "enum": [*values, UNKNOWN]} for name, values in choices.items()},
        "required": list(choices),
        "additionalProperties": False,
    }


def read_attributes(text: str, choices: Choices) -> dict[str, str] | None:
    """The attributes of an answer, those that are unknown left out; None where it does not follow the schema."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, Mapping) or set(found) != set(choices):
        return None
    if any(value != UNKNOWN and value not in choices[name] for name, value in found.items()):
        return None
    return {name: value for name, value in found.items() if value != UNKNOWN}


# The words of the question about a thing, and the thing's own beside its kinds.
_THINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gender": (("gender",), ()),
    "hair": (("hair",), ("hair",)),
    "hat": (("hat",), ("hat",)),
    "upper": (("upper",), ("top",)),
    "lower": (("lower", "pants"), ()),
    "shoes": (("shoes",), ("shoes", "footwear")),
    "carried": (("hand", "hands", "holding", "carrying"), ()),
}
_PROPERTIES = ("length", "colour", "pattern")
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "woman": ("female", "lady"),
    "man": ("male", "gentleman"),
    "grey": ("gray",),
    "blond": ("blonde",),
    "t-shirt": ("t shirt", "tee shirt", "tee"),
    "trousers": ("pants",),
    "sneakers": ("trainers",),
    "trainers": ("sneakers",),
    "checked": ("checkered", "plaid"),
}
_DOUBT = re.compile(
    r"\b(or|either|maybe|perhaps|possibl[ey]|probably|likely|may|might|could|cannot|can't|unable|unclear|unsure|sure|"
    r"clearly|visible|seen|tell|determined?|difficult|impossible)\b"
)
_DENIED = re.compile(r"\b(?:no|not|nothing|none|without|neither|nor|empty|\w+n't)\b[^,]*")
_BEFORE = re.compile(
    r"\b(?:an?|the|his|her|their|with|of|has|have|in|is|are|over|under|wearing|carrying|holding|pair)\b|[:()]"
)
_AFTER = re.compile(r"\s+(?:is|are)\s+((?:(?!\b(?:an?|the|s?he|they|his|her|their|with|in|wearing)\b)[^,:()])*)")


def attributes_of(turns: Sequence[tuple[str, str]], choices: Choices) -> dict[str, str]:
    """Attributes that the answers to the free-text questions name in words of the vocabulary; others are left out.

    A kind (gender, hat, `shoes_kind`) is taken where the answer names one value and no other; a colour, pattern or
    length where one stands in the words before the thing ("black leather shoes") or is said of it ("shoes are black").
    A sentence in doubt ("or", "not visible") tells nothing, and a thing denied is `none` (hair: `bald`) where the
    vocabulary has that. What goes unsaid stays unknown: no pattern named is not `plain`.

    Args:
        turns: (question, answer), told apart by words of the question. choices: attributes named like those of PERSON.
    """
    found: dict[str, str] = {}
    for thing, (topics, nouns) in _THINGS.items():
        asked = [answer for question, answer in turns if set(topics) & set(re.findall("[a-z]+", question.lower()))]
        names = [name for name in (thing, *(f"{thing}_{part}" for part in ("kind", *_PROPERTIES))) if name in choices]
        if names and len(asked) == 1:
            found |= _read_thing(asked[0].lower().replace("’", "'"), thing, names, nouns, choices)
    return {name: found[name] for name in choices if name in found}


def _read_thing(
    answer: str, thing: str, names: Sequence[str], nouns: Sequence[str], choices: Choices
) -> dict[str, str]:
    """What an answer says of one thing, whose attributes are `names`."""
    kind = thing if thing in choices else f"{thing}_kind"
    kinds = [value for value in choices.get(kind, ()) if value != "none"]
    if thing == "hair":
        answer = re.sub(r"(?<!not )(?<!n't )\bbald\b", "no hair", answer)
    denied, said, phrases = False, set[str](), []
    for sentence in re.split(r"[.;!?\n]+|\bbut\b", answer):
        if _DOUBT.search(sentence):
            continue
        denied |= any(_is_absent(thing, words, [*kinds, *nouns]) for words in _DENIED.findall(sentence))
        stated = _DENIED.sub("", sentence)
        for start, end, value in _mentions(stated, [*kinds, *nouns]):
            said |= {value} & set(kinds)
            follows = _AFTER.match(stated, end)
            phrases.append((_BEFORE.split(stated[:start])[-1], follows[1] if follows else ""))
    if denied:  # and if it is named nevertheless, the answer contradicts itself
        return {} if phrases else {name: v for name in names for v in choices[name] if v in ("none", "bald")}
    found = {kind: said.pop()} if len(said) == 1 else {}
    if len(phrases) == 1:  # of two things it is not known which one is meant
        for name in names:
            values = [value for value in choices[name] if value not in ("none", "bald")]
            before, after = phrases[0]
            meant = {value for _, _, value in _mentions(f"{_listed(before, values)};{after}", values)}
            if name != kind and len(meant) == 1:
                found[name] = meant.pop()
    return found


def _is_absent(thing: str, denied: str, words: Sequence[str]) -> bool:
    """Whether a denial is of the thing, or of everything that one could wear or carry there."""
    if thing == "carried":
        return bool(re.search(r"\b(nothing|anything|empty)\b", denied)) and not _mentions(denied, words)
    if thing == "lower":
        return bool(re.search(r"\blower[- ]body\b|\bpants\b", denied))
    return thing in ("hat", "hair") and bool(_mentions(denied, words))


def _listed(before: str, values: Sequence[str]) -> str:
    """The last part of "a jacket and blue", and all of "black and white", whose parts are values both."""
    *parts, last = re.split(r",|\band\b", before)
    for part in reversed(parts):
        if not any(part[end:].isspace() or end == len(part) for _, end, _ in _mentions(part, values)):
            break
        last = f"{part};{last}"
    return last


def _mentions(text: str, values: Sequence[str]) -> list[tuple[int, int, str]]:
    """Where values stand in a text as whole words, (start, end, value), the longest first: `t-shirt` is no `shirt`."""
    if not values:
        return []
    pattern, meant = _pattern(tuple(values))
    return [(found.start(), found.end(), meant[found[1]]) for found in pattern.finditer(text)]


@functools.lru_cache(maxsize=256)
def _pattern(values: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    meant = {other: value for value in values for other in _SPELLINGS.get(value, ())}
    meant |= {value: value for value in values}
    longest = sorted(meant, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest))})(?:e?s)?(?![\w-])"), meant


def read_vocabulary(store: Store) -> Choices:
    """What structured answers choose from: the dataset's own vocabulary, or the usual one."""
    attributes = store.manifest("attributes")
    if attributes is None:
        return PERSON
    return {name: tuple(values) for name, values in attributes.notes["vocabulary"].items()}
