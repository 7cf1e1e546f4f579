"""Re-ranking by verdicts: a multimodal engine has looked at the first images, and its verdicts join the similarity.

The weight of the verdicts is learned where the right answers are known (`ceca.evaluation.reranking`). An engine that
tells nothing gets the weight 0, which changes no rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

POINTS = {"fits": 1, "unseen": 0, "differs": -1}  # of a verdict (ceca.dialogue.verdicts.Verdict)


def support(verdicts: Iterable[str]) -> int:
    """Add up what an engine says about one image: claims that fit, minus claims that differ."""
    return sum(POINTS[verdict] for verdict in verdicts)


def worth_asking(similarity: np.ndarray, margin: float | None) -> np.ndarray:
    """Tell where the first two images are so close that an engine's look may change their order.

    Args:
        similarity: [Q, K] similarities of each query's best images, best first.
        margin: largest difference between the first two; None has no limit.

    Returns:
        [Q] booleans. A single image has no order to change.
    """
    if similarity.shape[1] < 2:
        return np.zeros(len(similarity), bool)
    return np.full(len(similarity), True) if margin is None else similarity[:, 0] - similarity[:, 1] <= margin


def rerank_by_verdicts(similarity: np.ndarray, support: np.ndarray, weight: float) -> np.ndarray:
    """Compute new similarities of each query's best images: s' = s + weight · (claims that fit - claims that differ).

    If each claim is judged wrongly at one rate, independently, the sum is the logarithm of the odds that the image
    shows the person, up to a factor that is the same for all images of a query. The weight stands for this factor.

    Args:
        similarity: [Q, K] similarities.
        support: [Q, K], `support` of each image.
        weight: factor of the support, 0 or more.

    Returns:
        [Q, K] similarities, in the order of the old ones.
    """
    return np.asarray(similarity, np.float64) + weight * support
