"""Datasheet of a drawn benchmark: what it consists of, counted from its ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ceca.datasets.drawn.levels import LEVELS


def datasheet(drawing: Mapping[str, Any], images: Sequence[Mapping[str, Any]], lookalikes: int) -> str:
    """The text of DATASHEET.md.

    Args:
        drawing: arguments of the drawing, and the gains of its cameras.
        images: ground truth of every image.
        lookalikes: people drawn as a look-alike.
    """
    level = LEVELS[drawing["level"]]
    captions = [caption for image in images for caption in image["captions"]]
    long = sum(caption["long"] for caption in captions)
    wrong = sum(bool(caption["wrong"]) for caption in captions)
    silent = len({image["id"] for image in images if image["distractor"]})
    people = len({image["id"] for image in images})
    rows = [
        ("people in train, val, test", ", ".join(map(str, drawing["identities"]))),
        ("images", len(images)),
        ("tracklets", len({image["tracklet"] for image in images})),
        ("captions", len(captions)),
        (f"look-alikes (differ in {level.changes[0]} to {level.changes[1]} attributes)", f"{lookalikes} of {people}"),
        ("people of test without a query", silent),
        ("captions at length (above 77 tokens)", f"{long} of {len(captions)}"),
        (f"captions with a wrong attribute (rate {level.wrong:g} each)", f"{wrong} of {len(captions)}"),
        ("a thing is left out beyond the usual", f"at a rate of {level.missing:g}"),
        *(
            (f"camera {number}: gain of red, green, blue", ", ".join(f"{gain:.2f}" for gain in gains))
            for number, gains in enumerate(drawing["cameras"], 1)
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# Drawn pedestrians, level {drawing['level']}, seed {drawing['seed']}\n\n{_WHY}\n| | |\n|---|---|\n{table}\n"
        f"\n{_LIMITS}"
    )


_WHY = """**Why.** To measure methods of person retrieval where a perfect score is far, without pictures of real people.
Nobody is shown, nobody wrote the captions, and no licence binds: everything is drawn by a program from a seed, and the
same arguments give the same bytes.
"""

_LIMITS = """**Truth.** `attributes.json` has every image's attributes, view, lighting, camera, tracklet and whether its
person is a distractor, and of every caption which attributes it gets wrong and whether it is long.

**Limits.** A caption with a wrong attribute may describe somebody else better, so no method can be right every time.
Colours under a dark or tinted camera can be mistaken. Drawings say nothing about how good a method is on photographs.

**Use.** Compare methods with each other on the same seeds. Do not report the figures beside those of published sets.
"""
