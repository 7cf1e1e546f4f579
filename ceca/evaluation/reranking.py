"""Figures of re-ranking by verdicts, and the weight that raises them most on a split whose answers are known."""

from __future__ import annotations

import dataclasses

import numpy as np

from ceca.evaluation.significance import paired_bootstrap
from ceca.metrics import AT, PER_QUERY
from ceca.search.reranking import rerank_by_verdicts

# Weights that are tried. Similarities of a query's best images lie hundredths apart.
WEIGHTS = (0.0, *(0.0005 * 2 ** (step / 2) for step in range(22)))
SIGNIFICANT = 0.05
PRECISION = PER_QUERY.index("average_precision")


@dataclasses.dataclass(frozen=True)
class Best:
    """The K best images of Q queries, best first; they stay ahead of all others when they are ranked again.

    Attributes:
        similarity: [Q, K].
        own: [Q, K] booleans, whether the image shows the query's person.
        matches: [Q], number of images of the query's person in the whole gallery.
        identities: [Q], the person that each query describes.
        figures: [Q, 8] figures of the queries over the whole gallery (`PER_QUERY`).
    """

    similarity: np.ndarray
    own: np.ndarray
    matches: np.ndarray
    identities: np.ndarray
    figures: np.ndarray

    def ranked_by(self, similarity: np.ndarray) -> np.ndarray:
        """Compute the figures when the best images are ranked by other similarities.

        Images behind the first K keep their places. So only what the first K add to a figure changes, and the gallery
        is not ranked again. Among equal similarities, other people come first.

        Args:
            similarity: [Q, K] new similarities, in the order of the old ones.

        Returns:
            [Q, 8] `PER_QUERY`; the last two columns, which are similarities, stay those of the old ones.
        """
        before, after = (self._sorted_by(values) for values in (self.similarity, similarity))
        figures = self.figures.copy()
        matches = np.maximum(self.matches, 1)
        figures[:, PRECISION] += (_precision(after) - _precision(before)) / matches
        some = after.any(axis=1)
        first = np.where(some, 1 + after.argmax(axis=1), figures[:, PER_QUERY.index("first")])
        figures[:, PER_QUERY.index("first")] = first
        figures[:, : len(AT)] = (first[:, None] > 0) & (first[:, None] <= np.array(AT))
        inside = some & (after.sum(axis=1) == self.matches)  # else the last match lies behind the first K
        last = after.shape[1] - after[:, ::-1].argmax(axis=1)
        penalty = PER_QUERY.index("inverse_negative_penalty")
        figures[:, penalty] = np.where(inside, self.matches / last, figures[:, penalty])
        return figures

    def _sorted_by(self, similarity: np.ndarray) -> np.ndarray:
        """`own` in the order of these similarities."""
        return np.take_along_axis(self.own, np.lexsort((self.own, -similarity), axis=1), axis=1)


def _precision(own: np.ndarray) -> np.ndarray:
    """Sum of the precision at each match, [Q], of matches in ranked order [Q, K]."""
    precision: np.ndarray = (own * own.cumsum(axis=1) / np.arange(1, own.shape[1] + 1)).sum(axis=1)
    return precision


def learn_weight(best: Best, support: np.ndarray) -> float:
    """Choose the weight of verdicts by the mAP of queries whose answers are known.

    The smallest weight with the largest mAP is taken, if its gain is significant in the paired bootstrap over the
    people; else 0. Because it is the best of many weights, its p-value counts as many times (Bonferroni). So an engine
    that tells nothing, or too few queries to know, lower no figure.

    Args:
        best: the best images of the queries.
        support: [Q, K], `ceca.search.reranking.support` of each image.

    Returns:
        One of `WEIGHTS`.
    """
    precision = [best.ranked_by(rerank_by_verdicts(best.similarity, support, w))[:, PRECISION] for w in WEIGHTS]
    chosen = max(range(len(WEIGHTS)), key=lambda number: precision[number].mean())
    gain = paired_bootstrap(precision[0], precision[chosen], best.identities)
    return WEIGHTS[chosen] if gain.p * (len(WEIGHTS) - 1) < SIGNIFICANT else 0.0
