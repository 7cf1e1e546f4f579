"""Attributes with a vocabulary, for filters in search.

The values come from a structured answer (JSON that follows a schema) or from the words of the free-text answers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ceca.data.store import Manifest, Store
from ceca.errors import UserError

Choices = Mapping[str, Sequence[str]]  # attribute → possible values

UNKNOWN = "unknown"
_NOT = "not "

_COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "beige")

# Default vocabulary: the attributes that descriptions of pedestrians mention most.
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


def read_vocabulary(store: Store, images: Manifest | None = None) -> Choices:
    """Return the vocabulary of the attributes of these images (default: the current ones), or PERSON without any."""
    images = images or store.manifest("images")
    attributes = store.belonging("attributes", images) if images is not None else None
    if attributes is None:
        return PERSON
    return {name: tuple(values) for name, values in attributes.notes["vocabulary"].items()}


def oracle_attributes(store: Store, images: Manifest) -> Manifest:
    """Return the table that the oracle answers from.

    Raises:
        UserError: these images have none.
    """
    attributes = store.belonging("attributes", images)
    if attributes is None:
        raise UserError(
            f"the oracle reads its answers from the attributes of drawn pedestrians, and {store.uri} has no table "
            "of attributes of its images; choose --engine vllm or --engine openai"
        )
    return attributes


def read_truth(store: Store, images: Manifest) -> dict[str, dict[str, Any]]:
    """Return what the oracle knows of each image: image id → fields of `ceca.dialogue.conversation.Subject`.

    Raises:
        UserError: as `oracle_attributes`.
    """
    table = store.read(oracle_attributes(store, images), ["image_id", "view", "attributes"])
    rows = zip(*(table[name].to_pylist() for name in ("image_id", "view", "attributes")), strict=True)
    return {key: {"view": view, "attributes": dict(pairs)} for key, view, pairs in rows}


# --- structured answers -----------------------------------------------------------------------------------


def json_schema(choices: Choices) -> dict[str, Any]:
    """Return the JSON schema of a structured answer: each attribute has one of its values or is unknown."""
    return {
        "type": "object",
        "properties": {name: {"type": "string", "enum": [*values, UNKNOWN]} for name, values in choices.items()},
        "required": list(choices),
        "additionalProperties": False,
    }


def denied(value: str) -> str:
    """Return the choice that says that an attribute does not have a value.

    >>> denied("red")
    'not red'
    """
    return f"{_NOT}{value}"


def chosen(value: str | None, possible: Sequence[str]) -> str:
    """Return the choice that somebody makes who sees a value.

    Args:
        value: what is seen; None if nothing is.
        possible: choices, also of the form `denied`.

    Returns:
        The value itself, or the denial of another one, or `UNKNOWN`.
    """
    if value is None or value in possible:
        return value or UNKNOWN
    return next((choice for choice in possible if choice.startswith(_NOT)), UNKNOWN)


def read_attributes(text: str, choices: Choices) -> dict[str, str] | None:
    """Read a structured answer.

    Args:
        text: the answer, as JSON.
        choices: vocabulary of the schema.

    Returns:
        The known attributes; None if the answer does not follow the schema.
    """
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    if not isinstance(answer, Mapping) or set(answer) != set(choices):
        return None
    if any(value != UNKNOWN and value not in choices[name] for name, value in answer.items()):
        return None
    return {name: value for name, value in answer.items() if value != UNKNOWN}


# --- free-text answers ------------------------------------------------------------------------------------


class _Thing(NamedTuple):
    """A thing that a question is about.

    Attributes:
        topics: words that identify the question.
        nouns: words for the thing itself, besides its kinds.
    """

    topics: tuple[str, ...]
    nouns: tuple[str, ...] = ()


class _Mention(NamedTuple):
    """A value in a text, from `start` to `end`."""

    start: int
    end: int
    value: str


class _Phrase(NamedTuple):
    """The words before a thing ("black leather" shoes) and the statement after it (shoes are "black")."""

    before: str
    after: str


_THINGS = {
    "gender": _Thing(("gender",)),
    "hair": _Thing(("hair",), ("hair",)),
    "hat": _Thing(("hat",), ("hat",)),
    "upper": _Thing(("upper",), ("top",)),
    "lower": _Thing(("lower", "pants")),
    "shoes": _Thing(("shoes",), ("shoes", "footwear")),
    "carried": _Thing(("hand", "hands", "holding", "carrying")),
}
_PROPERTIES = ("length", "colour", "pattern")
_ABSENT = ("none", "bald")  # values for a thing that the person does not have
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "navy": ("dark blue",),
    "jeans": ("denim trousers", "denim pants"),
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
_WORD = re.compile("[a-z]+")
_DOUBT = re.compile(
    r"\b(or|either|maybe|perhaps|possibl[ey]|probably|likely|may|might|could|cannot|can't|unable|unclear|unsure|sure|"
    r"clearly|visible|seen|tell|determined?|difficult|impossible)\b"
)
_DENIED = re.compile(r"\b(?:no|not|nothing|none|without|neither|nor|empty|\w+n't)\b[^,]*")
_BEFORE = re.compile(
    r"\b(?:an?|the|his|her|their|with|of|has|have|had|in|is|are|was|were|over|under|wear(?:s|ing)?|"
    r"carr(?:y|ies|ying)|hold(?:s|ing)?|pair)\b|[:()]"
)
_AFTER = re.compile(
    r"\s+(?:is|are|was|were)\s+((?:(?!\b(?:an?|the|s?he|they|his|her|their|with|in|wear(?:s|ing)?)\b)[^,:()])*)"
)


def attributes_of(turns: Sequence[tuple[str, str]], choices: Choices) -> dict[str, str]:
    """Read the attributes that the free-text answers name in words of the vocabulary.

    A kind (gender, hat, `shoes_kind`) is read if the answer names exactly one value. A colour, pattern or length is
    read from the words before the thing ("black leather shoes") or from a statement about it ("shoes are black").
    A sentence in doubt ("or", "not visible") is ignored. A denied thing is `none` (hair: `bald`) if the vocabulary
    has this value. An attribute that is not mentioned stays unknown: without a named pattern, it is not `plain`.

    Args:
        turns: pairs (question, answer). Words of the question decide which thing the answer is about.
        choices: vocabulary; its attributes are named as in PERSON.

    Returns:
        The known attributes, in the order of the vocabulary.
    """
    values: dict[str, str] = {}
    for name, thing in _THINGS.items():
        answers = [answer for question, answer in turns if set(thing.topics) & set(_WORD.findall(question.lower()))]
        parts = ("kind", *_PROPERTIES)
        attributes = [attribute for attribute in (name, *(f"{name}_{part}" for part in parts)) if attribute in choices]
        if attributes and len(answers) == 1:
            values |= _read_thing(answers[0].lower().replace("’", "'"), name, attributes, choices)
    return {attribute: values[attribute] for attribute in choices if attribute in values}


def named(text: str, values: Sequence[str]) -> tuple[str | None, set[str]]:
    """Return the one value that a text names, None if it names none or several; and the text's other words.

    What a sentence denies is no value, and a sentence in doubt names none.

    >>> value, others = named("Not black. It was blue.", ["black", "blue"])
    >>> value, sorted(others)
    ('blue', ['it', 'not', 'was'])
    """
    text = text.lower().replace("’", "'")
    said = {mention.value for sentence in _sentences(text) for mention in _mentions(_DENIED.sub("", sentence), values)}
    for mention in reversed(_mentions(text, values)):
        text = text[: mention.start] + text[mention.end :]
    return said.pop() if len(said) == 1 else None, set(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text))


def _sentences(text: str) -> list[str]:
    """Return the parts of a text that state something; questions and those in doubt are left out."""
    sentences = (part for part, mark in re.findall(r"([^.;!?\n]+)([.;!?\n]?)", text) if mark != "?")
    return [part for sentence in sentences for part in re.split(r"\bbut\b", sentence) if not _DOUBT.search(part)]


def _read_thing(answer: str, name: str, attributes: Sequence[str], choices: Choices) -> dict[str, str]:
    """Read the attributes of one thing from the answer about it.

    Args:
        answer: the answer in lower case.
        name: key of _THINGS.
        attributes: attributes of the thing.
        choices: vocabulary.
    """
    kind = name if name in choices else f"{name}_kind"
    kinds = [value for value in choices.get(kind, ()) if value != "none"]
    words = [*kinds, *_THINGS[name].nouns]
    if name == "hair":
        answer = re.sub(r"(?<!not )(?<!n't )\bbald\b", "no hair", answer)
    denied, named, phrases = False, set[str](), list[_Phrase]()
    for sentence in _sentences(answer):
        denied |= any(_is_absent(name, denial, words) for denial in _DENIED.findall(sentence))
        stated = _DENIED.sub("", sentence)
        for mention in _mentions(stated, words):
            named |= {mention.value} & set(kinds)
            after = _AFTER.match(stated, mention.end)
            phrases.append(_Phrase(_BEFORE.split(stated[: mention.start])[-1], after[1] if after else ""))
    if denied:  # a thing that is denied and also mentioned is a contradiction
        return {} if phrases else {a: value for a in attributes for value in choices[a] if value in _ABSENT}
    values = {kind: named.pop()} if len(named) == 1 else {}
    if len(phrases) == 1:  # with two mentions, it is unclear which one the question is about
        for attribute in attributes:
            possible = [value for value in choices[attribute] if value not in _ABSENT]
            text = f"{_last_item(phrases[0].before, possible)};{phrases[0].after}"
            meant = {mention.value for mention in _mentions(text, possible)}
            if attribute != kind and len(meant) == 1:
                values[attribute] = meant.pop()
    return values


def _is_absent(name: str, denial: str, words: Sequence[str]) -> bool:
    """Whether a denial is about this thing, or about everything that a person could wear or carry there."""
    if name == "carried":
        return bool(re.search(r"\b(nothing|anything|empty)\b", denial)) and not _mentions(denial, words)
    if name == "lower":
        return bool(re.search(r"\blower[- ]body\b|\bpants\b", denial))
    return name in ("hat", "hair") and bool(_mentions(denial, words))


def _last_item(before: str, values: Sequence[str]) -> str:
    """Return the last item of a list of words, with the earlier items if each of them ends in a value.

    "a jacket and blue" gives "blue"; "black and white" gives both colours.
    """
    *earlier, last = re.split(r",|\band\b", before)
    for item in reversed(earlier):
        if not any(item[mention.end :].isspace() or mention.end == len(item) for mention in _mentions(item, values)):
            break
        last = f"{item};{last}"
    return last


def _mentions(text: str, values: Sequence[str]) -> list[_Mention]:
    """Find values as whole words in a text. The longest value wins: `t-shirt` is not a `shirt`."""
    if not values:
        return []
    pattern, meaning = _pattern(tuple(values))
    return [_Mention(match.start(), match.end(), meaning[match[1]]) for match in pattern.finditer(text)]


@functools.lru_cache(maxsize=256)
def _pattern(values: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return a pattern that matches the values in all spellings, and the value of each spelling."""
    meaning = {spelling: value for value in values for spelling in _SPELLINGS.get(value, ())}
    meaning |= {value: value for value in values}
    longest = sorted(meaning, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest))})(?:e?s)?(?![\w-])"), meaning
