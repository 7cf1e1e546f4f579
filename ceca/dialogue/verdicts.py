"""Verdicts: an engine says whether an image fits what a description states, one attribute at a time.

A verdict depends on the image, the claim and the engine, and not on the rest of the description. So what was asked for
one description is known for the next one that states the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ceca.dialogue.answers import spoken
from ceca.dialogue.attributes import Choices, attributes_of, denied, read_attributes
from ceca.dialogue.conversation import QUESTIONS, Engine, Subject

VERDICT_VERSION = "verdict-1"  # must change if the question changes
TOKENS = 64  # length limit of an answer; the longest one is a short line of JSON

Verdict = Literal["fits", "differs", "unseen"]

# What the question calls an attribute; others are called by their names.
NAMES = {
    "gender": "gender of the person",
    "hair_length": "length of the hair",
    "hair_colour": "colour of the hair",
    "hat": "kind of hat",
    "hat_colour": "colour of the hat",
    "upper_kind": "kind of clothes on the upper body",
    "upper_colour": "colour of the clothes on the upper body",
    "upper_pattern": "pattern of the clothes on the upper body",
    "lower_kind": "kind of clothes on the lower body",
    "lower_colour": "colour of the clothes on the lower body",
    "lower_pattern": "pattern of the clothes on the lower body",
    "shoes_kind": "kind of shoes",
    "shoes_colour": "colour of the shoes",
    "carried": "thing that the person carries",
    "carried_colour": "colour of the thing that the person carries",
}


class Claim(NamedTuple):
    """What a description states: an attribute has a value."""

    attribute: str
    value: str


def stated(description: str, choices: Choices) -> tuple[Claim, ...]:
    """Read what a description states of a person; words in doubt are left out (`attributes_of`).

    Args:
        description: one or more sentences about one person.
        choices: vocabulary.

    Returns:
        The claims, in the order of the vocabulary; at most one per attribute.
    """
    # The description is read as the answer to each question: nobody knows which sentence is about what.
    found = attributes_of([(question, description) for question in QUESTIONS], choices)
    return tuple(Claim(attribute, value) for attribute, value in found.items())


def wording(claim: Claim) -> str:
    """Text of the question about a claim."""
    name = NAMES.get(claim.attribute, claim.attribute.replace("_", " "))
    return (
        f"Look at the {name}: is it '{claim.value}'? Answer with '{claim.value}' or '{denied(claim.value)}' as JSON, "
        "with 'unknown' if it cannot be seen."
    )


async def judge(engine: Engine, subject: Subject, claim: Claim) -> Verdict:
    """Ask whether an image fits a claim.

    The image comes first in the prompt and the question last, so that an engine's prefix cache holds the image from
    one claim to the next.

    Args:
        engine: started engine.
        subject: the image.
        claim: what is asked about.

    Returns:
        The verdict; `unseen` also for an answer that does not follow its schema.

    Raises:
        DialogueError: the engine cannot answer about this image.
        EngineError: the engine cannot answer about any image.
    """
    choices = {claim.attribute: (claim.value, denied(claim.value))}
    answer = await engine.answer(subject, (), wording(claim), TOKENS, choices)
    seen = (read_attributes(spoken(answer.text).text, choices) or {}).get(claim.attribute)
    if seen is None:
        return "unseen"
    return "fits" if seen == claim.value else "differs"
