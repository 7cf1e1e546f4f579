"""What a drawn person looks like: the declared vocabularies, and how coherent people are drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache

import numpy as np

NONE = "none"  # the value of an attribute of a thing the person does not have

COLOURS = (
    "black", "white", "grey", "red", "orange", "yellow", "green", "blue", "navy", "purple", "pink", "brown",
)  # fmt: skip

# Every attribute and all its values. What goes with what is said by `choices`.
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

# How often a value is worn where values are not equally likely; a value that is not named weighs 1.
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
    """The visible attributes of one person; every value comes from `VOCABULARY`.

    The colour (and pattern) of a thing that the person does not have is "none"; under a dress the three
    attributes of the lower garment are "none".
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
        """Raises ValueError where a value is outside the vocabulary or does not go with the others."""
        values = asdict(self)
        for name, value in values.items():
            if value not in choices(name, values):
                raise ValueError(f"{name} cannot be {value!r} here; choose from {choices(name, values)}")


NAMES: tuple[str, ...] = tuple(field.name for field in fields(Attributes))

# An attribute that says more about a thing -> the attribute that says whether the thing is there.
THING_OF = {
    "hair_colour": "hair_length", "hat_colour": "hat", "carried_colour": "carried",
    "lower_colour": "lower_kind", "lower_pattern": "lower_kind",
}  # fmt: skip
ABSENT = {NONE, "bald"}

# Attributes whose choices depend on each other (and on the gender), in the order of drawing.
GROUPS = (
    ("hair_length", "hair_colour"),
    ("hat", "hat_colour"),
    ("upper_kind", "upper_pattern", "lower_kind", "lower_pattern", "lower_colour", "upper_colour"),
    ("shoes_kind", "shoes_colour"),
    ("carried", "carried_colour"),
)


def choices(name: str, person: Mapping[str, str]) -> tuple[str, ...]:
    """Values that attribute `name` may take, given the attributes in `person` that come before it.

    Args:
        name: an attribute of `VOCABULARY`.
        person: values of the gender and of the attributes that stand before `name` in its group.

    Returns:
        The values, in the vocabulary's order; never empty.
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
        unusual = {"shorts", "skirt"}  # would not be seen under it
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
    if name == "hair_length":  # men mostly wear it short
        usual = {"man": {"short": 6.0, "long": 0.4}, "woman": {"long": 2.5, "shoulder-length": 1.5}}
        weights = weights * [usual[person["gender"]].get(value, 1.0) for value in values]
    return values[int(rng.choice(len(values), p=weights / weights.sum()))]


def sample_person(rng: np.random.Generator) -> Attributes:
    """Draw one coherent person."""
    person = {"gender": VOCABULARY["gender"][int(rng.integers(2))]}
    for group in GROUPS:
        for name in group:
            person[name] = _choose(name, person, rng)
    return Attributes(**person)


def similar_person(rng: np.random.Generator, other: Attributes, changes: int) -> Attributes:
    """Draw a look-alike: the same gender as `other`, and exactly `changes` visible differences.

    Raises:
        ValueError: `changes` is below 1 or above 6.
    """
    if not 1 <= changes <= 6:
        raise ValueError(f"a look-alike differs in 1 to 6 attributes, not {changes}")
    names = [name for name in NAMES if name != "gender"]
    while True:
        person = other
        for index in rng.choice(len(names), size=changes, replace=False):
            person = _changed(person, names[int(index)], rng)
        if len(differences(person, other)) == changes:
            return person


def _changed(person: Attributes, name: str, rng: np.random.Generator) -> Attributes:
    """`person` with another value of `name`; what hangs on it is drawn anew only where it must be."""
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
    """Names of the attributes in which two people visibly differ.

    Where only one of them has a thing (a hat, say), its colour is not counted as a further difference.
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
    """Number of different people that the vocabularies allow."""

    def count(names: tuple[str, ...], person: dict[str, str]) -> int:
        values = choices(names[0], person)
        if len(names) == 1:
            return len(values)
        if names[1:] == ("upper_colour",):  # hangs on nothing: no need to walk through it
            return len(values) * len(COLOURS)
        return sum(count(names[1:], {**person, names[0]: value}) for value in values)

    total = 0
    for gender in VOCABULARY["gender"]:
        people = 1
        for group in GROUPS:
            people *= count(group, {"gender": gender})
        total += people
    return total
