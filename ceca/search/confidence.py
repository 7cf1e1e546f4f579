"""Confidence: the probability that the first hit shows the person asked for, calibrated on the validation split.

A search always has a first hit, also where the person is not in the gallery. `ceca evaluate --split val` measures how
often a first hit of a similarity is right (`ceca.evaluation.open_set`), and keeps it with the evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ceca.data.names import EVALUATIONS
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.search.ranking import Hit

CALIBRATED_ON: Literal["val"] = "val"  # the split, and the name of its evaluation


class NoConfidence(UserError):
    """A search asks for a least confidence, and there is no calibration for it."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How often a first hit is right, by its similarity, where half of the people asked for are not there.

    Attributes:
        omega: ω of the similarities.
        images: number of images in the gallery that was searched.
        similarities: ascending.
        confidences: of these similarities, not descending, neither 0 nor 1. Between them it is linear.
        min_confidence: (share of false alarms, the confidence that kept them there); None if none did.
    """

    omega: float
    images: int
    similarities: tuple[float, ...]
    confidences: tuple[float, ...]
    min_confidence: tuple[tuple[float, float | None], ...]

    def confidence(self, similarity: Any, images: int) -> Any:
        """Confidence in first hits.

        Twice as many images have twice as many strangers who look similar, so the odds of the person against a
        stranger fall in proportion.

        Args:
            similarity: of the first hit, a number or an array.
            images: number of images that the search could find.
        """
        confidence = np.interp(similarity, self.similarities, self.confidences)
        return confidence / (confidence + (1 - confidence) * max(images, 1) / self.images)

    def of_hits(self, hits: Sequence[Hit], omega: float, images: int) -> float | None:
        """Confidence in the most similar hit of a search; None if there is no hit, or ω is another one."""
        if not hits or not self.fits(omega):
            return None
        return float(self.confidence(max(hit.similarity for hit in hits), images))

    def fits(self, omega: float) -> bool:
        """Whether a search by this ω has a confidence."""
        return abs(omega - self.omega) < 1e-6


def read_calibration(store: Store, digest: str) -> Calibration | None:
    """The calibration of a model, by its digest; None if its validation split was not evaluated."""
    evaluation = store.read_json(EVALUATIONS, digest, f"{CALIBRATED_ON}.json") or {}
    kept = evaluation.get("calibration")
    if kept is None:
        return None
    choices = tuple((share, least) for share, least in kept["min_confidence"])
    similarities, confidences = tuple(kept["similarities"]), tuple(kept["confidences"])
    return Calibration(kept["omega"], kept["images"], similarities, confidences, choices)


def require_confidence(calibration: Calibration | None, omega: float) -> None:
    """Check that a search that asks for a least confidence can be answered.

    Raises:
        NoConfidence: the model was not calibrated, or for another ω.
    """
    if calibration is None:
        raise NoConfidence(
            "min_confidence needs a model whose validation split was evaluated (`ceca evaluate --split val`), "
            "and a search without neighbours and re-ranking"
        )
    if not calibration.fits(omega):
        raise NoConfidence(
            f"the confidence was calibrated for ω = {calibration.omega:g}, but this search has {omega:g}"
        )
