"""Which samples a dataset has: images with their summaries, and the (image, caption) pairs of training."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from ceca.data.store import Manifest, Reject, Store, StoreError

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
