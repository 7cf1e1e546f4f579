"""Natural English captions: varied, incomplete as people's captions are, and never wrong about who is described."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from ceca.datasets.drawn.attributes import Attributes

Rng = np.random.Generator

# Synonyms of each value. A colour word belongs to one colour only.
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "navy": ("navy", "navy blue", "dark blue"),
    "grey": ("grey", "gray"),
    "purple": ("purple", "violet"),
    "red": ("red", "bright red"),
}
HAIR_WORDS: dict[str, tuple[str, ...]] = {
    "blond": ("blond", "blonde"),
    "ginger": ("ginger", "reddish"),
    "brown": ("brown", "brunette"),
    "grey": ("grey", "gray"),
}
PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "striped": ("striped", "stripy"),
    "checked": ("checked", "plaid", "chequered"),
    "dotted": ("dotted", "polka-dot", "spotted"),
    "zebra": ("zebra-print", "zebra-striped"),
    "floral": ("floral", "flowery"),
    "camouflage": ("camouflage", "camo"),
}
NOUNS: dict[str, tuple[str, ...]] = {
    "t-shirt": ("t-shirt", "tee", "short-sleeved top"),
    "tank top": ("tank top", "sleeveless top"),
    "shirt": ("shirt", "long-sleeved shirt", "button-up shirt"),
    "sweater": ("sweater", "jumper", "pullover"),
    "hoodie": ("hoodie", "hooded sweatshirt"),
    "jacket": ("jacket", "short coat"),
    "long coat": ("long coat", "overcoat"),
    "dress": ("dress", "knee-length dress"),
    "trousers": ("trousers", "pants"),
    "jeans": ("jeans", "denim trousers"),
    "shorts": ("shorts",),
    "skirt": ("skirt", "knee-length skirt"),
    "leggings": ("leggings", "tight leggings"),
    "trainers": ("trainers", "sneakers", "shoes"),
    "leather shoes": ("leather shoes", "shoes"),
    "boots": ("boots",),
    "sandals": ("sandals",),
    "high heels": ("high heels", "heels", "high-heeled shoes"),
    "cap": ("cap", "baseball cap"),
    "beanie": ("beanie", "knitted hat"),
    "sun hat": ("sun hat", "wide-brimmed hat"),
    "backpack": ("backpack", "rucksack"),
    "handbag": ("handbag", "purse"),
    "shoulder bag": ("shoulder bag", "messenger bag"),
    "shopping bag": ("shopping bag", "paper bag"),
    "suitcase": ("suitcase", "trolley case"),
    "umbrella": ("umbrella", "folded umbrella"),
    "book": ("book",),
}
PLURAL = {"trousers", "jeans", "shorts", "leggings", "trainers", "leather shoes", "boots", "sandals", "high heels"}
PEOPLE = {
    "man": ("man", "man", "guy", "male pedestrian", "gentleman"),
    "woman": ("woman", "woman", "lady", "female pedestrian", "young woman"),
    "person": ("person", "pedestrian"),
}
_CARRYING = {
    "backpack": ("carrying {}", "wearing {}", "with {}"),
    "handbag": ("carrying {}", "holding {}", "with {}"),
    "shoulder bag": ("carrying {}", "with {}"),
    "shopping bag": ("carrying {}", "holding {}", "with {} in one hand"),
    "suitcase": ("pulling {}", "wheeling {}", "with {}"),
    "umbrella": ("holding {}", "carrying {}", "with {} in one hand"),
    "book": ("holding {}", "carrying {}", "with {} in one hand"),
}
_SEEN = {
    "front": ("facing the camera", "walking towards the camera", "seen from the front"),
    "back": ("seen from behind", "walking away from the camera", "facing away"),
    "left": ("walking to the left", "seen from the side", "in profile"),
    "right": ("walking to the right", "seen from the side", "in profile"),
}

_PLACE_WORDS = {
    "street": "a street", "wall": "a wall beside a pavement", "shop front": "the window of a shop",
    "park": "a path in a park", "corridor": "a corridor inside a building", "square": "a paved square from above",
}  # fmt: skip
_LIGHT_WORDS = {
    "day": "on a sunny day", "overcast": "under a cloudy sky", "dusk": "in the evening", "indoor": "by lamplight",
    "backlit": "against strong light",
}  # fmt: skip

# Probability of mentioning a thing, and of mentioning its colour, pattern or length if the thing is mentioned.
MENTIONED = {
    "gender": 0.95, "upper": 0.98, "lower": 0.95, "shoes": 0.65, "hat": 0.8, "hair": 0.6, "carried": 0.82,
    "view": 0.25, "colour": 0.93, "pattern": 0.82, "hair_length": 0.8, "hair_colour": 0.8,
}  # fmt: skip

# Templates of a caption. A part in [brackets] is dropped if one of its slots is empty.
# {They}, {their}, {are}, {have} and {wear} agree with the gender, or with "they" if the gender is not mentioned.
SKELETONS = (
    "{A_person}[ with {hair}] is wearing {clothes}[, {carrying}].[ {They} {are} {seen}.]",
    "{A_person}[ with {hair}] wears {clothes}.[ {They} {are} {doing}.][ {They} {are} {seen}.]",
    "{The_person} is dressed in {clothes}.[ {They} {have} {hair}.][ {They} {are} {doing}.]",
    "{A_person} in {clothes}[, {carrying}].[ {They} {have} {hair}.][ {They} {are} {seen}.]",
    "{The_person} has on {clothes}[, and has {hair}].[ {They} {are} {doing}.]",
    "Wearing {clothes}, {the_person}[ with {hair}] {walks}[, {carrying}].",
    "Dressed in {clothes}, {this_person} {walks}[, {carrying}].[ {They} {have} {hair}.]",
    "{This_person}[ with {hair}] wears {main}[ and {hat}].[ {Their} outfit also includes {rest}.]"
    "[ {They} {are} {doing}.]",
    "There is {a_person}[ with {hair}][ {seen}]. {They} {wear} {clothes}.[ {They} {are} {doing}.]",
    "The image shows {a_person}[ {seen}][, {carrying}]. {They} {wear} {clothes}[ and {have} {hair}].",
    "{A_person}[, {carrying},] {walks} in {clothes}.[ {They} {have} {hair}.]",
    "[With {hair}, ]{the_person} wears {clothes}.[ {They} {are} {doing}.][ {They} {are} {seen}.]",
    "{The_person}[ with {hair}] has put on {main}[ with {rest}].[ {They} {wear} {hat}.][ {They} {are} {doing}.]",
    "This is {a_person}[ {seen}][ with {hair}], wearing {clothes}[ and {doing}].",
    "[{Carrying}, ]{the_person}[ with {hair}] {walks} in {clothes}.",
)


@dataclass(frozen=True, slots=True)
class Mentions:
    """Noun phrases of the mentioned things; a phrase is empty if the thing is not mentioned."""

    who: str  # "man", "woman" or "person"
    upper: str
    lower: str
    shoes: str
    hat: str
    hair: str
    carrying: str
    seen: str


def describe(attributes: Attributes, view: str, rng: Rng, kept: float = 1.0) -> str:
    """Describe a person as seen in one image.

    Args:
        attributes: attributes of the person; only those visible in the view are mentioned.
        view: visible side of the person: "front", "back", "left" or "right".
        rng: source of the choices of content and wording.
        kept: factor of the probabilities of mentioning a thing.

    Returns:
        One to three English sentences. A colour stands directly before its thing.
    """
    mentions = _choose_mentions(attributes, view, rng, kept)
    return _fill(_pick(SKELETONS, rng), _slots(mentions, rng))


def describe_at_length(attributes: Attributes, view: str, place: str, lighting: str, rng: Rng) -> str:
    """Describe a person and the picture in full, in more than CLIP's 77 tokens and fewer than 168.

    Args:
        attributes: attributes of the person; all are mentioned.
        view: visible side of the person: "front", "back", "left" or "right".
        place: background, one of `PLACES`.
        lighting: one of `LIGHTINGS`.
        rng: source of the order and wording.

    Returns:
        Eight English sentences: two about the picture, six about the person in any order.
    """
    told = _choose_mentions(attributes, view, rng, math.inf)
    noun = _pick(PEOPLE[told.who], rng)
    where, when = _PLACE_WORDS[place], _LIGHT_WORDS[lighting]
    doing = ("walking " if told.carrying.startswith("with ") else "") + told.carrying
    picture = (
        f"The picture comes from a camera that looks at {where}, and it was taken {when}.",
        f"It shows {with_article(noun)} who is {told.seen} and fills nearly the whole height of the picture.",
    )
    person = [
        f"The upper part of the body is covered by {told.upper}, which is easy to see here.",
        f"The legs are covered by {told.lower}, down to the shoes."
        if told.lower
        else "The legs are bare below the dress.",
        f"On the feet of the {noun} one can see {told.shoes}.",
        f"As for the head, the {noun} has {told.hair}." if told.hair else "No hair is to be seen on the head.",
        f"There is {told.hat} on top of the head." if told.hat else "No hat and no cap covers the head.",
        f"The {noun} is {doing}." if doing else "Both hands are empty, and there is no bag anywhere.",
    ]
    return " ".join([*picture, *(person[int(index)] for index in rng.permutation(len(person)))])


def _pick(options: tuple[str, ...], rng: Rng) -> str:
    return options[int(rng.integers(len(options)))]


def _says(thing: str, rng: Rng, kept: float) -> bool:
    return bool(rng.random() < MENTIONED[thing] * kept)


def _choose_mentions(person: Attributes, view: str, rng: Rng, kept: float) -> Mentions:
    upper = lower = shoes = hat = carrying = ""
    if _says("lower", rng, kept) and person.lower_kind != "none":
        lower = _thing(person.lower_kind, person.lower_colour, person.lower_pattern, rng, kept)
    if _says("upper", rng, kept) or not lower:  # a caption names at least one garment
        upper = _thing(person.upper_kind, person.upper_colour, person.upper_pattern, rng, kept)
        if person.upper_pattern == "logo" and view == "front" and _says("pattern", rng, kept):
            upper += _pick((" with a logo on the chest", " with a printed logo"), rng)
    if _says("shoes", rng, kept):
        shoes = _thing(person.shoes_kind, person.shoes_colour, "plain", rng, kept)
    if person.hat != "none" and _says("hat", rng, kept):
        hat = _thing(person.hat, person.hat_colour, "plain", rng, kept)
    if person.carried != "none" and _says("carried", rng, kept):
        thing = _thing(person.carried, person.carried_colour, "plain", rng, kept)
        carrying = _pick(_CARRYING[person.carried], rng).format(thing)
    return Mentions(
        who=person.gender if _says("gender", rng, kept) else "person",
        upper=upper, lower=lower, shoes=shoes, hat=hat, hair=_hair(person, rng, kept), carrying=carrying,
        seen=_pick(_SEEN[view], rng) if _says("view", rng, kept) else "",
    )  # fmt: skip


def _thing(kind: str, colour: str, pattern: str, rng: Rng, kept: float) -> str:
    """Return a noun phrase such as "a navy striped shirt" or "white trainers"."""
    words = [_pick(COLOUR_WORDS.get(colour, (colour,)), rng)] if _says("colour", rng, kept) else []
    if pattern in PATTERN_WORDS and _says("pattern", rng, kept):
        words.insert(int(rng.integers(len(words) + 1)), _pick(PATTERN_WORDS[pattern], rng))
    phrase = " ".join([*words, _pick(NOUNS[kind], rng)])
    if kind not in PLURAL:
        return with_article(phrase)
    return f"a pair of {phrase}" if rng.random() < 0.25 else phrase


def _hair(person: Attributes, rng: Rng, kept: float) -> str:
    if not _says("hair", rng, kept):
        return ""
    if person.hair_length == "bald":  # a hat hides the bald head
        return "a bald head" if person.hat == "none" else ""
    words = [person.hair_length] if _says("hair_length", rng, kept) else []
    if _says("hair_colour", rng, kept) or not words:
        words.append(_pick(HAIR_WORDS.get(person.hair_colour, (person.hair_colour,)), rng))
    return " ".join([*words, "hair"])


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase: "an orange cap"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _join(things: list[str]) -> str:
    """Join things to an enumeration: "a, b and c"."""
    if len(things) < 2:
        return "".join(things)
    return ", ".join(things[:-1]) + " and " + things[-1]


def _slots(mentions: Mentions, rng: Rng) -> dict[str, str]:
    """Return the text of each slot of the skeletons; "" if there is nothing to say."""
    noun = _pick(PEOPLE[mentions.who], rng)
    plural = mentions.who == "person"
    garments = [thing for thing in (mentions.upper, mentions.lower) if thing]
    if rng.random() < 0.15:
        garments.reverse()
    accessories = [thing for thing in (mentions.shoes, mentions.hat) if thing]
    if rng.random() < 0.4:
        accessories.reverse()
    slots = {
        "a_person": with_article(noun),
        "the_person": f"the {noun}",
        "this_person": f"this {noun}",
        "they": {"man": "he", "woman": "she", "person": "they"}[mentions.who],
        "their": {"man": "his", "woman": "her", "person": "their"}[mentions.who],
        "are": "are" if plural else "is",
        "have": "have" if plural else "has",
        "wear": _pick(("are wearing", "wear") if plural else ("is wearing", "wears"), rng),
        "walks": _pick(("walks along", "is walking", "walks by"), rng),
        "clothes": _join(garments + accessories),
        "main": garments[0],
        "rest": _join([thing for thing in (*garments[1:], mentions.shoes) if thing]),
        "hat": mentions.hat,
        "hair": mentions.hair,
        "carrying": mentions.carrying,
        "doing": ("walking " if mentions.carrying.startswith("with ") else "") + mentions.carrying,
        "seen": mentions.seen,
    }
    starts = {name[0].upper() + name[1:]: text[:1].upper() + text[1:] for name, text in slots.items()}
    return slots | starts


def _fill(skeleton: str, slots: dict[str, str]) -> str:
    def optional(match: re.Match[str]) -> str:
        part = match.group(1)
        return part if all(slots[name] for name in re.findall(r"{(\w+)}", part)) else ""

    text = re.sub(r"\[([^\]]*)\]", optional, skeleton).format_map(slots)
    return text[0].upper() + text[1:]  # the first part may have been dropped
