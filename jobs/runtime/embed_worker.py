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
from ceca.data.tables import ImageRow
from ceca.datasets.images import ImageError, decode_image
from ceca.model.embed import embed_images, embed_texts
from ceca.model.weights import load_model
from jobs.runtime.embed import CaptionRow
from jobs.runtime.records import cut, from_json
from jobs.runtime.units import Output


class EmbedWorker:
    """Embeds images with their summaries, or captions as queries, each kind into its own table.

    A unit of work is {"images": [ImageRow, …]} or {"queries": [CaptionRow, …]}, the records as JSON.

    Args:
        uri: the dataset.
        model: name or URI of the model.
        images: the images table.
        schemas: "images" or "queries" → (name of its table, schema).
        batch: images or texts embedded together.
        gpu: compute on the GPU.
        replicas: workers that share this machine's CPUs.
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
        if "images" in work:
            return self._embed_images(from_json(ImageRow, work["images"]))
        return self._embed_queries(from_json(CaptionRow, work["queries"]))

    def _embed_images(self, rows: list[ImageRow]) -> Output:
        encoded = self.store.take(self.images, [(row.part, row.row) for row in rows], ["image"])["image"]
        with ThreadPoolExecutor(2) as decoders:  # Pillow decodes without holding Python's lock
            decoded = list(decoders.map(self._decode, [row.image_id for row in rows], encoded.to_pylist()))
        rejects = [pixels for pixels in decoded if isinstance(pixels, Reject)]
        kept = [(row, pixels) for row, pixels in zip(rows, decoded, strict=True) if not isinstance(pixels, Reject)]
        if not kept:
            return Output({}, rejects)
        embeddings = [
            embed_images(self.model, [pixels for _, pixels in batch], [row.summary for row, _ in batch], self.device)
            for batch in cut(kept, self.batch)
        ]
        columns: dict[str, list[Any]] = {
            "image_id": [row.image_id for row, _ in kept],
            "identity": [row.identity for row, _ in kept],
            "split": [row.split for row, _ in kept],
            "model_digest": [self.published.digest] * len(kept),
        }
        return Output(self._table("images", columns, embeddings), rejects)

    def _embed_queries(self, rows: list[CaptionRow]) -> Output:
        embeddings = [
            embed_texts(self.model, [row.text for row in batch], self.device) for batch in cut(rows, self.batch)
        ]
        columns: dict[str, list[Any]] = {
            "caption_id": [row.caption_id for row in rows],
            "identity": [row.identity for row in rows],
        }
        return Output(self._table("queries", columns, embeddings))

    def _table(self, kind: str, columns: dict[str, list[Any]], embeddings: Sequence[Any]) -> dict[str, pa.Table]:
        table, schema = self.schemas[kind]
        whole = [torch.cat(parts).cpu().numpy() for parts in zip(*embeddings, strict=True)]
        return {table: embedding_table(columns, whole, schema)}

    def _decode(self, image_id: str, content: bytes) -> np.ndarray | Reject:
        config = self.model.config
        try:
            return decode_image(content, config.image_height, config.image_width, config.image_resize)
        except ImageError as error:
            return Reject(image_id, error.reason, error.detail)


def embedding_table(columns: dict[str, list[Any]], embeddings: Sequence[np.ndarray], schema: pa.Schema) -> pa.Table:
    """Build a table of the given schema.

    Args:
        columns: the columns other than embeddings.
        embeddings: arrays [N, D] and [N, E] for the columns `global` and `local`.
        schema: decides order and precision.
    """
    arrays: dict[str, Any] = dict(columns)
    for name, values in zip(("global", "local"), embeddings, strict=True):
        kind = schema.field(name).type
        flat = pa.array(np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype()).reshape(-1))
        arrays[name] = pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    return pa.table(
        [pa.array(arrays[f.name], f.type) if f.name in columns else arrays[f.name] for f in schema], schema=schema
    )
