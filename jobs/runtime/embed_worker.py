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
from ceca.datasets.images import ImageError, decode_image
from ceca.model.embed import embed_images, embed_texts
from ceca.model.weights import load_model
from jobs.runtime.records import cut, rows_in
from jobs.runtime.units import Output


class EmbedWorker:
    """Embeds images with their summaries, or captions as queries, each kind into its own table.

    A unit of work has ranges of rows: {"images": …, "dialogues": …}, the latter if the model uses summaries, or
    {"queries": …}, rows of the captions table.

    Args:
        uri: the dataset.
        model: name or URI of the model.
        images: the images table.
        schemas: "images" or "queries" → (name of its table, schema).
        batch: images or texts embedded together.
        gpu: compute on the GPU.
        replicas: workers that share this machine's CPUs.
        dialogues: the table of summaries.
        captions: the captions table.
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
        dialogues: Manifest | None = None,
        captions: Manifest | None = None,
    ):
        self.device = torch.device("cuda" if gpu else "cpu")
        if not gpu:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // replicas))
        self.store, self.schemas, self.batch = Store(uri), schemas, batch
        self.tables = {"images": images, "dialogues": dialogues, "queries": captions}
        self.model, self.published = load_model(self.store, model, self.device)

    def __call__(self, work: dict[str, list[list[int]]]) -> Output:
        return self._embed_images(work) if "images" in work else self._embed_queries(work)

    def _read(self, work: dict[str, list[list[int]]], kind: str, columns: list[str]) -> pa.Table:
        """Columns of the rows that a unit names."""
        table = self.tables[kind]
        assert table is not None, "the plan names the tables of its units"
        return self.store.take(table, table.places(rows_in(work[kind])), columns)

    def _embed_images(self, work: dict[str, list[list[int]]]) -> Output:
        known = self._read(work, "images", ["image_id", "identity", "split", "image"])
        ids = known["image_id"].to_pylist()
        told = [""] * len(ids)
        if "dialogues" in work:
            told = self._read(work, "dialogues", ["summary"])["summary"].to_pylist()
        with ThreadPoolExecutor(2) as decoders:  # Pillow decodes without holding Python's lock
            decoded = list(decoders.map(self._decode, ids, known["image"].to_pylist()))
        rejects = [pixels for pixels in decoded if isinstance(pixels, Reject)]
        seen = [row for row, pixels in enumerate(decoded) if not isinstance(pixels, Reject)]
        kept = [(pixels, told[row]) for row, pixels in enumerate(decoded) if not isinstance(pixels, Reject)]
        if not kept:
            return Output({}, rejects)
        embeddings = [
            embed_images(self.model, [pixels for pixels, _ in batch], [summary for _, summary in batch], self.device)
            for batch in cut(kept, self.batch)
        ]
        columns = {name: known[name].take(seen).to_pylist() for name in ("image_id", "identity", "split")}
        columns["model_digest"] = [self.published.digest] * len(seen)
        return Output(self._table("images", columns, embeddings), rejects)

    def _embed_queries(self, work: dict[str, list[list[int]]]) -> Output:
        known = self._read(work, "queries", ["caption_id", "identity", "text"]).to_pydict()
        embeddings = [embed_texts(self.model, texts, self.device) for texts in cut(known["text"], self.batch)]
        columns = {name: known[name] for name in ("caption_id", "identity")}
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
