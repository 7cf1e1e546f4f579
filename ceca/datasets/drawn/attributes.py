"""Attributes of a drawn person: the vocabularies, and sampling of coherent people from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache

import numpy as np

NONE = "none"  # attribute value for a thing that the person does not have

COLOURS = (
    "black", "white", "grey", "red", "orange", "yellow", "green", "blue", "navy", "purple", "pink", "brown",
)  # fmt: skip

# All attributes and their values. `choices` defines which values go together.
VOCABULARY: dict[str, tuple[str, ...]] = {
    "gender": ("man", "woman"),
    "hair_length": ("bald", "short", "shoulder-length", "long"),
    "hair_colour": (NONE, "black", "brown", "blond", "ginger", "grey"),
    "hat": (NONE, "cap", "beanie", "sun hat"),
    "hat_colour": (NONE, *COLOURS),
    "upper_kind": ("t-shirt", "tank top", "shirt", "sweater", "hoodie", "jacket", "long coat", "dress"),
    "upper_colour": COLOURS,
    "upper_pattern": ("plain", "striped", "checked", "dotted", "zebra", "floral", "logo"),
    "lower_kind": (NONE, "trousers", "jeans", "shorts", "skirt", "leggings"),
    "lower_colour": (NONE, *COLOURS),
    "lower_pattern": (NONE, "plain", "striped", "checked", "dotted", "zebra", "floral", "camouflage"),
    "shoes_kind": ("trainers", "leather shoes", "boots", "sandals", "high heels"),
    "shoes_colour": COLOURS,
    "carried": (
        NONE, "backpack", "handbag", "shoulder bag", "shopping bag", "suitcase", "umbrella", "book",
    ),
    "carried_colour": (NONE, *COLOURS),
}  # fmt: skip

UPPER_PATTERNS = {
    "t-shirt": ("plain", "striped", "dotted", "zebra", "logo"),
    "tank top": ("plain", "striped", "dotted"),
    "shirt": ("plain", "striped", "checked", "dotted", "floral"),
    "sweater": ("plain", "striped", "checked", "zebra"),
    "hoodie": ("plain", "striped", "logo"),
    "jacket": ("plain", "checked"),
    "long coat": ("plain", "checked"),
    "dress": ("plain", "striped", "checked", "dotted", "zebra", "floral"),
}
LOWER_PATTERNS = {
    NONE: (NONE,),
    "trousers": ("plain", "striped", "checked", "camouflage"),
    "jeans": ("plain",),
    "shorts": ("plain", "striped", "checked", "camouflage"),
    "skirt": ("plain", "striped", "checked", "dotted", "floral"),
    "leggings": ("plain", "zebra", "dotted"),
}
JEANS_COLOURS = ("blue", "navy", "black", "grey", "white")

# Relative frequency of values. A value that is not listed has weight 1.
WEIGHTS: dict[str, dict[str, float]] = {
    "hair_length": {"bald": 0.3, "short": 1.5},
    "hair_colour": {"black": 2.5, "brown": 2, "ginger": 0.6},
    "hat": {NONE: 5},
    "upper_kind": {"t-shirt": 2, "shirt": 1.5, "jacket": 1.6, "tank top": 0.6},
    "upper_pattern": {"plain": 2.5, "striped": 1.4, "checked": 1.4},
    "lower_kind": {"trousers": 2, "jeans": 1.6, "skirt": 1.4},
    "lower_colour": {"black": 2.5, "blue": 2, "grey": 1.5, "navy": 1.5, "purple": 0.6, "orange": 0.5},
    "lower_pattern": {"plain": 5},
    "shoes_kind": {"trainers": 2, "boots": 1.3},
    "shoes_colour": {"black": 3, "white": 3, "brown": 2, "grey": 1.5},
    "carried": {NONE: 3, "backpack": 2, "handbag": 1.4},
}


@dataclass(frozen=True, slots=True)
class Attributes:
    """Visible attributes of one person, with values from `VOCABULARY`.

    If the person does not have a thing, its colour and pattern are "none". With a dress, the three attributes of the
    lower garment are "none".

    Raises:
        ValueError: a value is not in the vocabulary or does not go with the other values.
    """

    gender: str
    hair_length: str
    hair_colour: str
    hat: str
    hat_colour: str
    upper_kind: str
    upper_colour: str
    upper_pattern: str
    lower_kind: str
    lower_colour: str
    lower_pattern: str
    shoes_kind: str
    shoes_colour: str
    carried: str
    carried_colour: str

    def __post_init__(self) -> None:
        values = asdict(self)
        for name, value in values.items():
            if value not in choices(name, values):
                raise ValueError(f"{name} cannot be {value!r} here; choose from {choices(name, values)}")


NAMES: tuple[str, ...] = tuple(field.name for field in fields(Attributes))

# Attribute that describes a thing → attribute that says whether the person has the thing.
THING_OF = {
    "hair_colour": "hair_length", "hat_colour": "hat", "carried_colour": "carried",
    "lower_colour": "lower_kind", "lower_pattern": "lower_kind",
}  # fmt: skip
ABSENT = {NONE, "bald"}

# Groups of attributes that depend on each other and on the gender, in the order of sampling.
GROUPS = (
    ("hair_length", "hair_colour"),
    ("hat", "hat_colour"),
    ("upper_kind", "upper_pattern", "lower_kind", "lower_pattern", "lower_colour", "upper_colour"),
    ("shoes_kind", "shoes_colour"),
    ("carried", "carried_colour"),
)


def choices(name: str, person: Mapping[str, str]) -> tuple[str, ...]:
    """Return the possible values of an attribute, given the earlier attributes of the person.

    Args:
        name: attribute of `VOCABULARY`.
        person: values of the gender and of the attributes before `name` in its group.

    Returns:
        At least one value, in the order of the vocabulary.
    """
    man = person.get("gender") == "man"
    if name in THING_OF and person[THING_OF[name]] in ABSENT:
        return (NONE,)
    if name == "upper_pattern":
        return UPPER_PATTERNS.get(person["upper_kind"], ())
    if name == "lower_pattern":
        return LOWER_PATTERNS.get(person["lower_kind"], ())
    if name == "lower_colour" and person["lower_kind"] == "jeans":
        return JEANS_COLOURS
    if name == "lower_kind" and person["upper_kind"] == "dress":
        return (NONE,)
    unusual: set[str] = set()
    if name == "lower_kind" and person["upper_kind"] == "long coat":
        unusual = {"shorts", "skirt"}  # a long coat hides them
    if name in THING_OF or name == "lower_kind":
        unusual = unusual | {NONE}
    if man:
        unusual = unusual | {"dress", "skirt", "leggings", "high heels", "handbag"}
    elif name == "hair_length":
        unusual = unusual | {"bald"}
    return tuple(value for value in VOCABULARY[name] if value not in unusual)


def _choose(name: str, person: Mapping[str, str], rng: np.random.Generator) -> str:
    values = choices(name, person)
    weights = np.array([WEIGHTS.get(name, {}).get(value, 1.0) for value in values])
    if name == "hair_length":  # most men have short hair
        usual = {"man": {"short": 6.0, "long": 0.4}, "woman": {"long": 2.5, "shoulder-length": 1.5}}
        weights = weights * [usual[person["gender"]].get(value, 1.0) for value in values]
    return values[int(rng.choice(len(values), p=weights / weights.sum()))]


def sample_person(rng: np.random.Generator) -> Attributes:
    """Sample one coherent person."""
    person = {"gender": VOCABULARY["gender"][int(rng.integers(2))]}
    for group in GROUPS:
        for name in group:
            person[name] = _choose(name, person, rng)
    return Attributes(**person)


def similar_person(rng: np.random.Generator, other: Attributes, changes: int) -> Attributes:
    """Sample a look-alike of another person.

    Args:
        rng: source of random choices.
        other: the other person; the look-alike has the same gender.
        changes: exact number of visible differences, 1 to 6.

    Raises:
        ValueError: `changes` is below 1 or above 6.
    """
    if not 1 <= changes <= 6:
        raise ValueError(f"a look-alike must differ in 1 to 6 attributes, not {changes}")
    names = [name for name in NAMES if name != "gender"]
    while True:
        person = other
        for index in rng.choice(len(names), size=changes, replace=False):
            person = _change(person, names[int(index)], rng)
        if len(differences(person, other)) == changes:
            return person


def _change(person: Attributes, name: str, rng: np.random.Generator) -> Attributes:
    """Give an attribute another value. Dependent attributes are sampled again only if their value became impossible."""
    values = asdict(person)
    others = [value for value in choices(name, values) if value != values[name]]
    if not others:
        return person
    values[name] = others[int(rng.integers(len(others)))]
    for group in GROUPS:
        for dependent in group if name in group else ():
            if values[dependent] not in choices(dependent, values):
                values[dependent] = _choose(dependent, values, rng)
    return Attributes(**values)


def differences(one: Attributes, other: Attributes) -> tuple[str, ...]:
    """Return the names of the attributes in which two people visibly differ.

    If only one of them has a thing (such as a hat), its colour is not counted as a second difference.
    """
    names = []
    for name in NAMES:
        thing = THING_OF.get(name, name)
        alone = (getattr(one, thing) in ABSENT) != (getattr(other, thing) in ABSENT)
        if getattr(one, name) != getattr(other, name) and not (alone and name in THING_OF):
            names.append(name)
    return tuple(names)


@cache
def distinct_people() -> int:
    """Count the different people that the vocabularies allow."""

    def count(names: tuple[str, ...], person: dict[str, str]) -> int:
        values = choices(names[0], person)
        if len(names) == 1:
            return len(values)
        if names[1:] == ("upper_colour",):  # no other attribute depends on it, so multiplying is enough
            return len(values) * len(COLOURS)
        return sum(count(names[1:], {**person, names[0]: value}) for value in values)

    total = 0
    for gender in VOCABULARY["gender"]:
        people = 1
        for group in GROUPS:
            people *= count(group, {"gender": gender})
        total += people
    return total
