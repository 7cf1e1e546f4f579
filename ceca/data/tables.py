"""Rows of the shared tables as records: images, their summaries, and the (image, caption) pairs of training."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from ceca.data.changes import erased_images
from ceca.data.store import Manifest, Reject, Store, StoreError

PAIRS = pa.schema(
    [
        ("part", pa.int32()),  # of the images table
        ("row", pa.int32()),  # within the part
        ("identity", pa.int64()),
        ("caption", pa.string()),
        ("summary", pa.string()),
    ]
)


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


def list_images(store: Store, images: Manifest, split: str | None = None) -> list[ImageRow]:
    """List images in the table's order, without their summaries.

    Args:
        store: the dataset.
        images: the version of the images table to read.
        split: only images of this split; None means all.
    """
    erased = erased_images(store)  # a table that another program brought back may have them again
    table = store.read(images, ["image_id", "identity", "split", "source_path"])
    places = [(number, row) for number, part in enumerate(images.parts) for row in range(part.rows)]
    return [
        ImageRow(**image, part=part, row=row)
        for image, (part, row) in zip(table.to_pylist(), places, strict=True)
        if (split is None or image["split"] == split) and image["image_id"] not in erased
    ]


def add_summaries(
    store: Store, rows: list[ImageRow], images: Manifest, dialogues: Manifest
) -> tuple[list[ImageRow], list[Reject]]:
    """Give images their summaries.

    Args:
        store: the dataset.
        rows: the images.
        images: the version of the images table that `rows` were read from.
        dialogues: the version of the dialogues table that holds the summaries.

    Returns:
        The images that have a summary, with it, and a reject for each of the others.

    Raises:
        StoreError: the dialogues were made from another version of the images table.
    """
    if dialogues.made_from.get("images") != images.version:
        raise StoreError(
            f"the dialogues in {store.uri} were made from images {dialogues.made_from.get('images')}, but "
            f"{images.version} are current; run the stage `dialogue` again"
        )
    summaries = read_summaries(store, dialogues)
    described = [dataclasses.replace(row, summary=summaries[row.image_id]) for row in rows if row.image_id in summaries]
    rejects = [
        Reject(row.image_id, "no_dialogue", f"{row.source_path} has no summary; see the rejects of the stage dialogue")
        for row in rows
        if row.image_id not in summaries
    ]
    return described, rejects


def read_summaries(store: Store, dialogues: Manifest) -> dict[str, str]:
    """Read the summaries: image id → summary."""
    table = store.read(dialogues, ["image_id", "summary"])
    return dict(zip(table["image_id"].to_pylist(), table["summary"].to_pylist(), strict=True))


def make_pairs(store: Store, rows: list[ImageRow], captions: Manifest) -> pa.Table:
    """Pair each caption of these images with its image.

    Args:
        store: the dataset.
        rows: the images; captions of other images are left out.
        captions: the version of the captions table to read.

    Returns:
        A table of schema `PAIRS`, in the order of the captions table.
    """
    by_id = {row.image_id: row for row in rows}
    table = store.read(captions, ["image_id", "text"])
    captioned = [
        (by_id[image_id], text)
        for image_id, text in zip(table["image_id"].to_pylist(), table["text"].to_pylist(), strict=True)
        if image_id in by_id
    ]
    columns = {
        "part": [image.part for image, _ in captioned],
        "row": [image.row for image, _ in captioned],
        "identity": [image.identity for image, _ in captioned],
        "caption": [text for _, text in captioned],
        "summary": [image.summary for image, _ in captioned],
    }
    return pa.table(columns, schema=PAIRS)
