"""Images, their summaries and their captions: as columns of row numbers to plan with, and as records at the edge.

Planning keeps 32 bytes per image, whatever is said about it: where it is, its key, whose image it is, and where its
dialogue is. What a worker needs it reads by these row numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ceca.data.changes import erased_images
from ceca.data.keys import Positions, known_numbers, numbers
from ceca.data.store import Manifest, Reject, Store, StoreError, in_order

PARTS_AT_ONCE = 64  # whose keys become numbers together: parts may be small


@dataclasses.dataclass(frozen=True)
class Images:
    """N images in the table's order, as columns.

    Attributes:
        table: the version of the images table.
        rows: [N] int64, row of each image in the whole table.
        keys: [N] uint64, its id as a number.
        identities: [N] int64.
        dialogues: the version of the dialogues table, if the images were looked up there.
        told: [N] int64, row of each image's dialogue in that table.
    """

    table: Manifest
    rows: np.ndarray
    keys: np.ndarray
    identities: np.ndarray
    dialogues: Manifest | None = None
    told: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: np.ndarray | slice) -> Images:
        """Some of the images: a mask, their positions, or a slice."""
        told = None if self.told is None else self.told[which]
        return Images(self.table, self.rows[which], self.keys[which], self.identities[which], self.dialogues, told)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """P pairs of an image and one of its captions, in the order of the captions table.

    Attributes:
        images: the images.
        captions: the version of the captions table.
        rows: [P] int64, row of each caption in that table.
        image: [P] int64, position of its image among the images.
        said_of: [P] int64, identity as the captions table has it.
    """

    images: Images
    captions: Manifest
    rows: np.ndarray
    image: np.ndarray
    said_of: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def identities(self) -> np.ndarray:
        """Identity of each image, [P]."""
        return self.images.identities[self.image]

    def take(self, which: np.ndarray) -> Pairs:
        """Some of the pairs: a mask, or their positions."""
        return Pairs(self.images, self.captions, self.rows[which], self.image[which], self.said_of[which])


def find_images(store: Store, images: Manifest, split: str | None = None) -> Images:
    """Find images without their summaries.

    Args:
        store: the dataset.
        images: the version of the images table to read.
        split: only images of this split; None means all.

    Raises:
        StoreError: the table is empty, or it has ids that are no keys.
    """
    erased = erased_images(store)  # a table that another program brought back may have them again
    columns: list[tuple[np.ndarray, ...]] = []
    start = 0
    for part in store.read_each(images, ["image_id", "identity", *(["split"] if split is not None else [])]):
        rows = np.arange(start, start + part.num_rows)
        start += part.num_rows
        if split is not None:
            chosen = pc.equal(part["split"], split)
            rows, part = rows[chosen.to_numpy()], part.filter(chosen)
        columns.append((rows, _keys(store, images, part), part["identity"].to_numpy()))
    whole = [np.concatenate(column) for column in zip(*columns, strict=True)]
    found = Images(images, whole[0], whole[1], whole[2])
    return found.take(~np.isin(found.keys, known_numbers(erased))) if erased else found


def find_dialogues(store: Store, images: Images, dialogues: Manifest) -> tuple[Images, list[Reject]]:
    """Look images up in the dialogues.

    Args:
        store: the dataset.
        images: the images.
        dialogues: the version of the dialogues table that holds the summaries.

    Returns:
        The images that have a summary, and a reject for each of the others.

    Raises:
        StoreError: the dialogues were made from another version of the images table.
    """
    _refuse_others(store, images.table, dialogues)
    told = Positions(read_keys(store, dialogues)).find(images.keys)
    described = dataclasses.replace(images, dialogues=dialogues, told=told).take(told >= 0)
    if len(described) == len(images):
        return described, []
    lacking = store.take(images.table, images.table.places(images.rows[told < 0]), ["image_id", "source_path"])
    return described, [_lacks_dialogue(**row) for row in lacking.to_pylist()]


def find_captions(store: Store, images: Images, captions: Manifest) -> Pairs:
    """Find the captions of images; other captions are left out.

    Args:
        store: the dataset.
        images: the images.
        captions: the version of the captions table.
    """
    parts = store.read_each(captions, ["image_id", "identity"])
    read = [(_keys(store, captions, part), part["identity"].to_numpy()) for part in parts]
    keys, identities = (np.concatenate(column) for column in zip(*read, strict=True))
    image = Positions(images.keys).find(keys)
    rows = np.flatnonzero(image >= 0)
    return Pairs(images, captions, rows, image[rows], identities[rows])


def read_keys(store: Store, table: Manifest) -> np.ndarray:
    """Ids of the images of a table's rows as numbers, [N] uint64.

    Raises:
        StoreError: the table is empty, or it has ids that are no keys.
    """
    parts = store.read_each(table, ["image_id"])
    keys = []
    while some := list(itertools.islice(parts, PARTS_AT_ONCE)):
        keys.append(_keys(store, table, pa.concat_tables(some)))
    return np.concatenate(keys)


def _keys(store: Store, table: Manifest, part: pa.Table) -> np.ndarray:
    try:
        return numbers(part["image_id"])
    except ValueError as error:
        raise StoreError(f"{store.place(table.table)}: {error}; run its stage again") from None


def _refuse_others(store: Store, images: Manifest, dialogues: Manifest) -> None:
    """Refuse dialogues that were made from another version of the images table.

    Raises:
        StoreError: they were.
    """
    if dialogues.made_from.get("images") != images.version:
        raise StoreError(
            f"the dialogues in {store.uri} were made from images {dialogues.made_from.get('images')}, but "
            f"{images.version} are current; run the stage `dialogue` again"
        )


def _lacks_dialogue(image_id: str, source_path: str) -> Reject:
    return Reject(image_id, "no_dialogue", f"{source_path} has no summary; see the rejects of the stage dialogue")


def read_texts(store: Store, table: Manifest, rows: np.ndarray, column: str) -> Iterator[list[str]]:
    """Texts of rows of a table, part by part; parts without such a row are not read.

    Args:
        store: the dataset.
        table: the table.
        rows: [N] ascending.
        column: name of the column.
    """
    bounds = np.cumsum([0, *(part.rows for part in table.parts)])
    places = np.searchsorted(rows, bounds)
    numbers_of_parts = np.flatnonzero(np.diff(places))
    wanted = [rows[places[part] : places[part + 1]] - bounds[part] for part in numbers_of_parts]
    read = in_order(functools.partial(store.read_columns, table, columns=[column]), numbers_of_parts.tolist())
    for content, chosen in zip(read, wanted, strict=True):
        yield content[column].take(chosen).to_pylist()


# --- records, for the edge ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """A row of the images table without its bytes: what is known of the image, and the row's place (part, row)."""

    image_id: str
    identity: int
    split: str
    part: int
    row: int
    source_path: str
    summary: str = ""


def list_images(store: Store, images: Images) -> list[ImageRow]:
    """Read what is known of images, with their summaries if they have dialogues: for a look at some, not for a stage.

    Args:
        store: the dataset.
        images: the images, as `find_images` and `find_dialogues` give them.
    """
    if not len(images):
        return []
    places = images.table.places(images.rows)
    known = store.take(images.table, places, ["image_id", "identity", "split", "source_path"]).to_pylist()
    told = [""] * len(images)
    if images.dialogues is not None and images.told is not None:
        told = store.take(images.dialogues, images.dialogues.places(images.told), ["summary"])["summary"].to_pylist()
    return [
        ImageRow(**image, part=part, row=row, summary=summary)
        for image, (part, row), summary in zip(known, places, told, strict=True)
    ]
