"""Structured answers: attributes with a vocabulary, asked for besides free text, for filters in search."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

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
