"""Which samples a dataset has: images with their summaries, and the (image, caption) pairs of training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from ceca.data.store import Manifest, Reject, Store, StoreError
from ceca.dialogue.attributes import PERSON, Choices

PAIRS = pa.schema(
    [
        ("part", pa.int32()),  # of the images table
        ("row", pa.int32()),
        ("identity", pa.int64()),
        ("caption", pa.string()),
        ("summary", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """Where an image's row is (part, row in part), and what is known of it but its bytes."""

    image_id: str
    identity: int
    split: str
    part: int
    row: int
    source_path: str
    summary: str = ""


def list_images(store: Store, images: Manifest, split: str | None = None) -> list[ImageRow]:
    """The images of a split (None: all), in the table's order, without their summaries."""
    table = store.read(images, ["image_id", "identity", "split", "source_path"]).to_pydict()
    places = [(number, row) for number, part in enumerate(images.parts) for row in range(part.rows)]
    columns = zip(table["image_id"], table["identity"], table["split"], table["source_path"], places, strict=True)
    return [
        ImageRow(image_id, identity, found, part, row, path)
        for image_id, identity, found, path, (part, row) in columns
        if split is None or found == split
    ]


def add_summaries(
    store: Store, rows: list[ImageRow], images: Manifest, dialogues: Manifest
) -> tuple[list[ImageRow], list[Reject]]:
    """The images that have a summary, with it; the others are rejects.

    Raises:
        StoreError: the dialogues were made from other images than those that are current.
    """
    if dialogues.made_from.get("images") != images.version:
        raise StoreError(
            f"the dialogues in {store.uri} were made from images {dialogues.made_from.get('images')}, but "
            f"{images.version} are current; run the stage `dialogue` again"
        )
    summaries = read_summaries(store, dialogues)
    told = [dataclasses.replace(row, summary=summaries[row.image_id]) for row in rows if row.image_id in summaries]
    missing = [
        Reject(row.image_id, "no_dialogue", f"{row.source_path} has no summary; see the rejects of the stage dialogue")
        for row in rows
        if row.image_id not in summaries
    ]
    return told, missing


def read_summaries(store: Store, dialogues: Manifest) -> dict[str, str]:
    """The summary of each image by its id."""
    table = store.read(dialogues, ["image_id", "summary"])
    return dict(zip(table["image_id"].to_pylist(), table["summary"].to_pylist(), strict=True))


def read_vocabulary(store: Store) -> Choices:
    """What structured answers choose from: the dataset's own vocabulary, or the usual one."""
    attributes = store.manifest("attributes")
    if attributes is None:
        return PERSON
    return {name: tuple(values) for name, values in attributes.notes["vocabulary"].items()}


def removed_images(store: Store, names: Sequence[str] | None = None) -> set[str]:
    """The ids of images that no search may find any more, whatever a gallery still holds (`ceca remove`).

    `names` are the objects below removed/ that count; None: all there are.
    """
    names = [name for name in (store.names("removed") if names is None else names) if not name.endswith(".erased.json")]
    with ThreadPoolExecutor(8) as readers:  # an object store answers many requests at once
        return {image_id for ids in readers.map(functools.partial(_removed, store), names) for image_id in ids}


_REMOVED: dict[tuple[str, str], tuple[str, ...]] = {}  # a record is named for its ids, so they are read once


def _removed(store: Store, name: str) -> tuple[str, ...]:
    found = _REMOVED.get((store.uri, name))
    if found is None:
        record = store.read_json("removed", name)
        if record is None:
            return ()
        found = _REMOVED[store.uri, name] = tuple(record["images"])
    return found


def make_pairs(store: Store, rows: list[ImageRow], captions: Manifest) -> pa.Table:
    """Every (image, caption) pair of these images, in the order of the captions table: schema PAIRS."""
    by_id = {row.image_id: row for row in rows}
    table = store.read(captions, ["image_id", "text"])
    texts = zip(table["image_id"].to_pylist(), table["text"].to_pylist(), strict=True)
    pairs = [(by_id[image_id], text) for image_id, text in texts if image_id in by_id]
    columns = [
        [image.part for image, _ in pairs],
        [image.row for image, _ in pairs],
        [image.identity for image, _ in pairs],
        [text for _, text in pairs],
        [image.summary for image, _ in pairs],
    ]
    return pa.table(columns, schema=PAIRS)


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


def share(rank: int, size: int, batch: int) -> slice:
    """The rows of a global batch that a worker takes: equal shares, or nearly, where the batch does not divide."""
    return slice(rank * batch // size, (rank + 1) * batch // size)


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
