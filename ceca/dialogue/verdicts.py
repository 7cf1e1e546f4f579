"""Verdicts: an engine says whether an image fits what a description states, one attribute at a time.

A verdict depends on the image, the claim and the engine, and not on the rest of the description. So what was asked for
one description is known for the next one that states the same.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from ceca.config import DialogueConfig, EvaluateConfig
from ceca.data.names import EVALUATIONS
from ceca.data.store import Store, version_of
from ceca.dialogue.answers import spoken
from ceca.dialogue.attributes import Choices, denied, read_attributes
from ceca.dialogue.conversation import Engine, Subject
from ceca.dialogue.engines import generation_settings
from ceca.dialogue.understanding import read_description
from ceca.settings import ConfigError, from_mapping

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
    return tuple(Claim(attribute, value) for attribute, value in read_description(description, choices).items())


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


# --- what they weigh --------------------------------------------------------------------------------------


def engine_digest(config: DialogueConfig) -> str:
    """A digest of what decides an engine's verdicts."""
    return version_of("verdicts", VERDICT_VERSION, generation_settings(config))


def learned_weights(store: Store, model_digest: str, engine: DialogueConfig, neighbours: int = 0) -> dict[float, float]:
    """Read the weights of an engine's verdicts that evaluations of a model learned (`ceca evaluate --rerank-engine`).

    Args:
        store: the dataset.
        model_digest: digest of the model.
        engine: the engine.
        neighbours: number of nearest images averaged into each gallery embedding.

    Returns:
        ω → weight. Of several evaluations with one ω, that counts which asked about the most images of a query, and of
        these that which asked about the most queries.
    """
    found: list[_Learned] = []
    for name in store.names(EVALUATIONS, model_digest):
        if "-by-" in name and name.endswith(".json"):  # `ceca.evaluation.evaluation.result_name`
            found += _read_learned(store.read_json(EVALUATIONS, model_digest, name), engine, neighbours)
    return {learned.omega: learned.weight for learned in sorted(found)}  # the last one counts


class _Learned(NamedTuple):
    """What an evaluation learned, in the order in which it counts."""

    images: int
    margin: float
    omega: float
    weight: float


def _read_learned(evaluation: Any, engine: DialogueConfig, neighbours: int) -> list[_Learned]:
    """What an evaluation learned; nothing if it is about another engine, or is no such evaluation."""
    try:
        config, reranking = from_mapping(EvaluateConfig, evaluation["config"]), evaluation["reranking"]
        margin = math.inf if config.rerank_margin is None else config.rerank_margin
        learned = _Learned(config.rerank_images, margin, float(evaluation["omega"]), float(reranking["weight"]))
    except (ConfigError, KeyError, TypeError, ValueError):
        return []
    asked = config.engine
    same = asked is not None and engine_digest(asked) == engine_digest(engine) and config.neighbours == neighbours
    return [learned] if same and math.isfinite(learned.weight) and learned.weight >= 0 else []
