"""Levels of difficulty of a drawn benchmark: who looks alike, how cameras differ, and what captions get wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ceca.datasets.drawn.attributes import NAMES, NONE, Attributes, similar_person


@dataclass(frozen=True, slots=True)
class Level:
    """What makes a drawing hard.

    Attributes:
        lookalike_share: share of people who look like an earlier person of their split.
        changes: fewest and most attributes in which they differ from that person.
        cameras: number of cameras, each with its place and its light; 0 gives every image its own.
        light: exposures of the cameras lie between exp(-light) and exp(light); their casts of red and blue within half.
        frames: images in a tracklet: one camera, place, light and view.
        wrong: probability that an attribute of a caption is wrong.
        missing: probability that a caption leaves out what it would mention.
        long: share of captions that describe everything at length, in more than CLIP's 77 tokens.
        distractors: share of the people of test who have no captions: the gallery shows them, and no query asks.
    """

    lookalike_share: float
    changes: tuple[int, int]
    cameras: int = 0
    light: float = 0.0
    frames: int = 1
    wrong: float = 0.0
    missing: float = 0.0
    long: float = 0.0
    distractors: float = 0.0


LEVELS = {
    "easy": Level(0.3, (2, 3)),
    "medium": Level(0.5, (1, 2), 3, light=0.2, frames=2, wrong=0.03, missing=0.1, long=0.15, distractors=0.2),
    "hard": Level(0.7, (1, 2), 6, light=0.4, frames=2, wrong=0.08, missing=0.25, long=0.3, distractors=0.4),
}


def camera_gains(level: Level, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Gain of red, green and blue of every camera; exposures are spread evenly, in random order."""
    exposures = rng.permutation(np.exp(np.linspace(-level.light, level.light, level.cameras)))
    casts = np.exp(rng.uniform(-level.light / 2, level.light / 2, (level.cameras, 2)))
    return [
        (float(exposure * red), float(exposure), float(exposure * blue))
        for exposure, (red, blue) in zip(exposures, casts, strict=True)
    ]


def may_be_wrong(person: Attributes) -> int:
    """Number of a person's attributes that a caption may get wrong: all that they have, but the gender."""
    return sum(name != "gender" and getattr(person, name) != NONE for name in NAMES)


def mistaken(person: Attributes, wrong: float, rng: np.random.Generator) -> Attributes:
    """The person as a caption takes them to be: a binomial number of attributes, six at most, have another value.

    Args:
        person: the true attributes.
        wrong: probability that an attribute is wrong, 0 to 1.
        rng: source of random choices.
    """
    errors = min(6, int(rng.binomial(may_be_wrong(person), wrong)))
    return similar_person(rng, person, errors) if errors else person
