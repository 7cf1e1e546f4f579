"""The order in which an epoch visits the training pairs, its batches, and the texts that each pair takes.

Notable: everything follows from (seed, epoch) alone, so the order is the same for any number of workers and after any
restart. Each purpose has a random stream of its own: changing how often summaries are swapped leaves the order as it
is. A pair is one (image, caption) of the training split of a set; P is their number in all sets.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ceca.config import TrainConfig

# One random stream per purpose.
STREAMS = {"order": 0, "summaries": 1, "captions": 2, "noise": 3, "division": 4, "portions": 5}


def batch_slice(rank: int, size: int, batch: int) -> slice:
    """The rows of a global batch that one worker takes; the slices differ by at most one row.

    Args:
        rank: the worker, from 0.
        size: number of workers.
        batch: samples in the global batch.
    """
    return slice(rank * batch // size, (rank + 1) * batch // size)


@dataclasses.dataclass(frozen=True)
class Batches:
    """The global batches of an epoch, one per step: equal ones, and if `keep_last` a smaller one at the end.

    Attributes:
        pairs: number of pairs that an epoch may visit.
        batch: samples in an equal batch.
        keep_last: whether the pairs that fill no batch make a smaller one, or are left out.
    """

    pairs: int
    batch: int
    keep_last: bool = False

    @classmethod
    def of(cls, pairs: int, config: TrainConfig) -> Batches:
        """The batches that the settings ask for."""
        return cls(pairs, config.global_batch, config.last_batch == "keep")

    def __len__(self) -> int:
        """Number of steps in an epoch."""
        return -(-self.pairs // self.batch) if self.keep_last else self.pairs // self.batch

    @property
    def samples(self) -> int:
        """Number of pairs that an epoch visits."""
        return min(self.pairs, len(self) * self.batch)

    def size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        return min(self.batch, self.pairs - step * self.batch)

    def places(self, step: int, rank: int, size: int) -> range:
        """The places in the epoch's order that one of `size` workers takes in a step; none if there are too few."""
        first, rows = step * self.batch, batch_slice(rank, size, self.size(step))
        return range(first + rows.start, first + rows.stop)


class Portion(NamedTuple):
    """What an epoch takes of a set: `taken` of its `pairs`, or each of them several times."""

    pairs: int
    taken: int

    @classmethod
    def of(cls, pairs: int, weight: float) -> Portion:
        """The portion of a set whose pairs are visited `weight` times per epoch on average; at least one pair."""
        return cls(pairs, max(1, round(weight * pairs)))


def epoch_pairs(portions: Sequence[Portion], seed: int, epoch: int) -> np.ndarray:
    """The pairs that an epoch visits, [sum of taken] int64 ascending; a pair of a set with a large weight repeats.

    Each set is an endless row of shuffles of its pairs, and an epoch takes the next ones. So after any number of epochs
    no pair of a set was visited more than once oftener than another, and a set that is taken whole is the same in each.

    Args:
        portions: of the sets, whose pairs are numbered one set after the other.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
    """
    first, chosen = 0, []
    for pairs, taken in portions:
        places = np.arange(epoch * taken, (epoch + 1) * taken)
        for shuffle in range(places[0] // pairs, places[-1] // pairs + 1):
            order = random_stream(seed, shuffle, "portions").permutation(pairs)
            chosen.append(first + order[places[places // pairs == shuffle] % pairs])
        first += pairs
    return np.sort(np.concatenate(chosen))


def epoch_order(identities: np.ndarray, seed: int, epoch: int, group: int = 1) -> np.ndarray:
    """The order in which an epoch visits its pairs, [P] int64.

    Args:
        identities: [P] of the pairs.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        group: number of pairs of one identity that follow each other; the last group of an identity may be smaller.
            Groups are shuffled; 1 shuffles single pairs.
    """
    order = random_stream(seed, epoch, "order").permutation(len(identities))
    if group == 1:
        return order
    # The shuffled pairs of each identity are cut into groups. A group stands where its first pair stood.
    by_identity = order[np.argsort(identities[order], kind="stable")]
    _, starts, counts = np.unique(identities[by_identity], return_index=True, return_counts=True)
    nth = np.arange(len(order)) - np.repeat(starts, counts)
    leader = by_identity[np.arange(len(order)) - nth % group]
    return by_identity[np.lexsort((nth % group, _inverse(order)[leader]))]


def epoch_partners(
    identities: np.ndarray, images: np.ndarray, seed: int, epoch: int, share: float, purpose: str
) -> np.ndarray:
    """For every pair, the pair that lends its summary or caption during an epoch, [P] int64; mostly the pair itself.

    With probability `share` the lender shows another image of the same identity, so that the model learns to connect
    words about one view with a picture of another. Pairs whose identity has only one image keep their own text.

    Args:
        identities: [P] of the pairs.
        images: [P] numbers that tell images apart.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        share: probability of another image's text.
        purpose: `summaries` or `captions`; the two are drawn independently.
    """
    random = random_stream(seed, epoch, purpose)
    touched, drawn = random.random(len(identities)) < share, random.random(len(identities))
    # In this order, the pairs of an identity lie next to each other, and among them the pairs of an image.
    order = np.lexsort((images, identities))
    person = _runs(identities[order])
    both = np.stack([identities[order], images[order]])
    image = _runs(np.unique(both, axis=1, return_inverse=True)[1].ravel())
    others = person.length - image.length
    # Choose among the pairs of the identity that lie outside the image's own run.
    chosen = person.start + (drawn[order] * others).astype(np.int64)
    chosen += np.where(chosen >= image.start, image.length, 0)
    partner = np.where((others > 0) & touched[order], order[np.minimum(chosen, len(order) - 1)], order)
    return partner[_inverse(order)]


def shuffled_captions(pairs: int, seed: int, share: float) -> np.ndarray:
    """For every pair, the pair whose caption it gets, [P] int64: noisy correspondence.

    A seeded share of the pairs exchange captions among themselves. Images keep their identities, as in RDE's noisy
    benchmarks.

    Args:
        pairs: P.
        seed: seed of the noise.
        share: share of the pairs that exchange captions.
    """
    random = random_stream(seed, 0, "noise")
    taken = np.sort(random.permutation(pairs)[: round(share * pairs)])
    result = np.arange(pairs)
    result[taken] = random.permutation(taken)
    return result


def published_noise(content: bytes, pairs: int) -> np.ndarray:
    """Read an index file that RDE, ICL and CECA ship: for every pair, the pair whose caption it gets, [P] int64.

    Args:
        content: bytes of the .npy file.
        pairs: P.

    Raises:
        ValueError: it is no such file, or is for another number of pairs.
    """
    try:
        source = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"not a NumPy file of numbers ({error})") from None
    if not isinstance(source, np.ndarray) or source.ndim != 1 or source.dtype.kind not in "iu":
        raise ValueError("expected one whole number per pair")
    if len(source) != pairs:
        raise ValueError(
            f"it has {len(source):,} numbers and this split {pairs:,} pairs; it is for another benchmark, "
            "or images were rejected"
        )
    if pairs and not 0 <= source.min() <= source.max() < pairs:
        raise ValueError(f"expected numbers from 0 to {pairs - 1}, found {source.min()} to {source.max()}")
    return source.astype(np.int64)


class _Runs(NamedTuple):
    """For every place in a sequence, the run of equal values around it: its start and its length, [P] each."""

    start: np.ndarray
    length: np.ndarray


def _runs(values: np.ndarray) -> _Runs:
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    lengths = np.diff(np.r_[starts, len(values)])
    return _Runs(np.repeat(starts, lengths), np.repeat(lengths, lengths))


def _inverse(order: np.ndarray) -> np.ndarray:
    """The inverse of a permutation: where each number stands in `order`, [P] int64."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return place


def random_stream(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """The random numbers of a purpose (`STREAMS`) in an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, STREAMS[purpose]]))
