"""Workers that embed images and texts with a published model; index and evaluation share them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ceca.data.store import Manifest, Reject, Store
from ceca.data.tables import ImageRow, add_summaries, list_images
from ceca.datasets.images import ImageError, decode_image
from ceca.model.embed import embed_images, embed_texts
from ceca.model.registry import PublishedModel
from ceca.model.weights import load_model
from jobs.runtime.units import Output


def plan_images(
    store: Store, model: PublishedModel, split: str | None
) -> tuple[Manifest, list[ImageRow], list[Reject], dict[str, str]]:
    """The images table, the rows to embed with what the model needs of them, those it cannot embed, and what that
    was made from."""
    images = store.current("images", "ingest")
    rows = list_images(store, images, split)
    made_from = {"model": model.digest, "images": images.version}
    if not model.config["model"]["summary_weight"]:
        return images, rows, [], made_from
    dialogues = store.current("dialogues", "dialogue")
    rows, rejects = add_summaries(store, rows, images, dialogues)
    return images, rows, rejects, {**made_from, "dialogues": dialogues.version}


def cut(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def image_item(row: ImageRow) -> list[Any]:
    """What EmbedWorker is told of an image."""
    return [row.part, row.row, row.image_id, row.identity, row.split, row.summary]


def embedding_table(columns: dict[str, list[Any]], embeddings: Sequence[np.ndarray], schema: pa.Schema) -> pa.Table:
    """Rows of `schema`: the given columns and the two embedding columns `global` and `local`."""
    arrays: dict[str, Any] = dict(columns)
    for name, values in zip(("global", "local"), embeddings, strict=True):
        kind = schema.field(name).type
        flat = pa.array(np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype()).reshape(-1))
        arrays[name] = pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    return pa.table(
        [pa.array(arrays[f.name], f.type) if f.name in columns else arrays[f.name] for f in schema], schema=schema
    )


class EmbedWorker:
    """Embeds images with their summaries, or captions as queries, each into the table named for it.

    A unit of work is {"images": [image_item, …]} or {"queries": [[caption_id, identity, text], …]}.
    """

    def __init__(
        self,
        uri: str,
        model: str,
        images: Manifest,
        schemas: dict[str, tuple[str, pa.Schema]],
        batch: int,
        gpu: bool,
        replicas: int,
    ):
        self.device = torch.device("cuda" if gpu else "cpu")
        if not gpu:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // replicas))
        self.store, self.images, self.schemas, self.batch = Store(uri), images, schemas, batch
        self.model, self.published = load_model(self.store, model, self.device)

    def __call__(self, work: dict[str, list[Any]]) -> Output:
        return self._embed_images(work["images"]) if "images" in work else self._embed_queries(work["queries"])

    def _embed_images(self, items: list[Any]) -> Output:
        encoded = self.store.take(self.images, [(part, row) for part, row, *_ in items], ["image"])["image"]
        with ThreadPoolExecutor(2) as decoders:  # Pillow decodes without holding Python's lock
            decoded = list(decoders.map(self._decode, [item[2] for item in items], encoded.to_pylist()))
        rejects = [pixels for pixels in decoded if isinstance(pixels, Reject)]
        kept = [(item, pixels) for item, pixels in zip(items, decoded, strict=True) if not isinstance(pixels, Reject)]
        if not kept:
            return Output({}, rejects)
        embeddings = [
            embed_images(self.model, [pixels for _, pixels in batch], [item[5] for item, _ in batch], self.device)
            for batch in cut(kept, self.batch)
        ]
        columns = {
            "image_id": [item[2] for item, _ in kept],
            "identity": [item[3] for item, _ in kept],
            "split": [item[4] for item, _ in kept],
            "model_digest": [self.published.digest] * len(kept),
        }
        return Output(self._table("images", columns, embeddings), rejects)

    def _embed_queries(self, items: list[Any]) -> Output:
        embeddings = [
            embed_texts(self.model, [text for _, _, text in batch], self.device) for batch in cut(items, self.batch)
        ]
        columns = {"caption_id": [item[0] for item in items], "identity": [item[1] for item in items]}
        return Output(self._table("queries", columns, embeddings))

    def _table(self, kind: str, columns: dict[str, list[Any]], embeddings: Sequence[Any]) -> dict[str, pa.Table]:
        table, schema = self.schemas[kind]
        whole = [torch.cat(parts).cpu().numpy() for parts in zip(*embeddings, strict=True)]
        return {table: embedding_table(columns, whole, schema)}

    def _decode(self, image_id: str, content: bytes) -> np.ndarray | Reject:
        config = self.model.config
        try:
            return decode_image(content, config.image_height, config.image_width)
        except ImageError as error:
            return Reject(image_id, error.reason, error.detail)
