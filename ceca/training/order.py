"""The order of training samples, and the caption and summary each takes: the same for any number of workers."""

from __future__ import annotations

import numpy as np


def epoch_order(identities: np.ndarray, seed: int, epoch: int, group: int = 1) -> np.ndarray:
    """The order in which an epoch visits all pairs, [P] int64: the same for any number of workers.

    Args:
        identities: [P] of the pairs. group: pairs of one identity come so many at a time (the last of an identity may
            be fewer), the groups shuffled; 1 shuffles the pairs.
    """
    order = _random(seed, epoch, "order").permutation(len(identities))
    if group == 1:
        return order
    # Within an identity the shuffled pairs are cut into groups; a group goes where its first pair was.
    by_identity = order[np.argsort(identities[order], kind="stable")]
    _, starts, counts = np.unique(identities[by_identity], return_index=True, return_counts=True)
    nth = np.arange(len(order)) - np.repeat(starts, counts)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    leader = by_identity[np.arange(len(order)) - nth % group]
    return by_identity[np.lexsort((nth % group, place[leader]))]


def epoch_partners(
    identities: np.ndarray, images: np.ndarray, seed: int, epoch: int, share: float, purpose: str
) -> np.ndarray:
    """For every pair, the pair whose summary or caption it takes in an epoch, [P] int64: mostly itself.

    With probability `share` it is one of another image of the same identity, so that what one view says is learned
    from the other's picture; an identity with one image keeps its own.

    Args:
        identities, images: [P] of the pairs; `images` tells images apart. purpose: `summaries` or `captions`, which
            are drawn independently.
    """
    random = _random(seed, epoch, purpose)
    touched, drawn = random.random(len(identities)) < share, random.random(len(identities))
    order = np.lexsort((images, identities))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))

    def block(of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and length of the run of equal values that each place lies in."""
        starts = np.flatnonzero(np.r_[True, of[1:] != of[:-1]])
        lengths = np.diff(np.r_[starts, len(of)])
        return np.repeat(starts, lengths), np.repeat(lengths, lengths)

    start, length = block(identities[order])
    # Images are told apart within an identity, where their pairs lie next to each other.
    both = np.stack([identities[order], images[order]])
    own, own_length = block(np.unique(both, axis=1, return_inverse=True)[1].ravel())
    others = length - own_length
    chosen = start + (drawn[order] * others).astype(np.int64)
    chosen += np.where(chosen >= own, own_length, 0)
    partner = np.where((others > 0) & touched[order], order[np.minimum(chosen, len(order) - 1)], order)
    return partner[place]


def shuffled_captions(pairs: int, seed: int, share: float) -> np.ndarray:
    """Noisy correspondence: for every pair, the pair whose caption it gets, [P] int64.

    A seeded `share` of the pairs exchange captions among them; the images keep their identities, as in the noisy
    benchmarks of RDE.
    """
    random = _random(seed, 0, "noise")
    taken = np.sort(random.permutation(pairs)[: round(share * pairs)])
    result = np.arange(pairs)
    result[taken] = random.permutation(taken)
    return result


def _random(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    streams = {"order": 0, "summaries": 1, "captions": 2, "noise": 3}
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, streams[purpose]]))
