"""A dataset and a model in Python: tables, searches and embeddings, in this process."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ceca.data.names import MANIFEST
from ceca.data.schema import NOBODY
from ceca.data.store import Manifest, Store
from ceca.errors import UserError
from ceca.search.confidence import require_confidence

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ceca.search.catalogue import Catalogue
    from ceca.search.searcher import Searcher


class People:
    """The images of people in a dataset.

    Args:
        uri: the dataset.
        model: name or URI of the model that searches; empty means the model that made the gallery.
        approximate: share of the images that a search compares exactly, 0 to 1 (docs/gallery.md); 0 searches exactly.

    Raises:
        UserError: `approximate` is no share.
    """

    def __init__(self, uri: str, model: str = "", approximate: float = 0.0):
        if not 0 <= approximate <= 1:
            raise UserError(f"approximate is a share from 0 to 1, found {approximate}")
        self.store, self._model, self._approximate = Store(uri), model, approximate

    def __repr__(self) -> str:
        return f"ceca.open({self.store.uri!r}): {', '.join(self.tables) or 'no table'}"

    @property
    def tables(self) -> list[str]:
        """Names of the published tables."""
        names = {name.removesuffix(f"/{MANIFEST}") for name in self._manifests()}
        return sorted(names)

    def _manifests(self) -> list[str]:
        kept = []
        for folder in self.store.names():
            for name in (folder, *(f"{folder}/{inner}" for inner in self.store.names(folder) if folder == "rejects")):
                if not folder.startswith(".") and self.store.fs.exists(self.store.path(name, MANIFEST)):
                    kept.append(f"{name}/{MANIFEST}")
        return kept

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a table.

        Args:
            name: such as `images`, `captions`, `dialogues`, `gallery` or `rejects/ingest`.
            columns: columns to read; None means all, of `images` with the bytes of every image.

        Raises:
            UserError: there is no such table, or it has no such column.
        """
        manifest = self._manifest(name)
        parts = []
        there: dict[str, None] = {}
        for part in manifest.parts:
            with self.store.open(name, part.path) as file:
                parquet = pq.ParquetFile(file)
                held = parquet.schema_arrow.names
                there |= dict.fromkeys(held)
                parts.append(parquet.read(columns=[column for column in columns or held if column in held]))
        if parts and (missing := [column for column in columns or () if column not in there]):
            raise UserError(f"table {name!r} has no column {', '.join(missing)}; it has {', '.join(there)}")
        # Parts may differ in a column that came later, such as the time of a picture.
        return pa.concat_tables(parts, promote_options="default") if parts else pa.table({})

    def parts(self, name: str) -> list[str]:
        """URIs of a table's Parquet files, as Ray Data, Polars, DuckDB and others read them.

        Raises:
            UserError: there is no such table.
        """
        manifest = self._manifest(name)
        return [self.store.place(manifest.table, part.path) for part in manifest.parts]

    def sql(self, query: str) -> pa.Table:
        """The answer of DuckDB, in which every table has its name (`rejects/ingest` is `rejects_ingest`).

        Raises:
            UserError: DuckDB is not installed.
        """
        try:
            import duckdb
        except ImportError:
            raise UserError("people.sql needs DuckDB: pip install duckdb") from None
        with duckdb.connect() as base:
            local = isinstance(self.store.fs, LocalFileSystem)
            if not local:
                base.register_filesystem(self.store.fs)
            for name in self.tables:
                parts = self._manifest(name).parts
                if files := [self.store.path(name, part.path) for part in parts] if local else self.parts(name):
                    listed = ", ".join(_quoted(file, "'") for file in files)
                    view = _quoted(name.replace("/", "_"), '"')
                    base.execute(f"CREATE VIEW {view} AS FROM read_parquet([{listed}], union_by_name = true)")
            answer: pa.Table = base.sql(query).to_arrow_table()
            return answer

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        omega: float = 0.3,
        where: Mapping[str, Sequence[str]] | None = None,
        min_confidence: float = 0.0,
    ) -> Hits:
        """Find the images of a person from a description.

        The gallery and its model are opened by the first search and kept; `ceca.open` again sees later changes.

        Args:
            query: the person in words.
            k: number of hits.
            omega: ω, the share of the local similarity, 0 to 1.
            where: facet → accepted values, such as {"camera": ["c1", "c2"]}.
            min_confidence: least probability, 0 to 1, that the first hit shows this person; below it nothing is
                returned, because probably nobody in the gallery does.

        Raises:
            UserError: there is no gallery, no such facet or value, or no confidence (`ceca.search.confidence`).
        """
        if not query.strip() or k < 1 or not 0 <= omega <= 1 or not 0 <= min_confidence <= 1:
            raise UserError(
                "a search needs words, k >= 1, omega and min_confidence from 0 to 1; "
                f"found {query!r}, {k}, {omega} and {min_confidence}"
            )
        if min_confidence:
            require_confidence(self._searcher.calibration, omega)
        found = self._searcher.search(query, omega=omega, top_k=k, where=where)
        confidence = self._searcher.confidence(found, omega, where)
        if confidence is not None and confidence < min_confidence:
            return Hits(query, (), confidence, self._approximate > 0)
        hits = []
        paths = self._catalogue.source_paths([hit.image_id for hit in found])
        for hit, path in zip(found, paths, strict=True):
            picture = self._catalogue.picture(hit.image_id)
            identity = None if hit.identity == NOBODY else hit.identity
            similarities = (hit.similarity, hit.global_similarity, hit.local_similarity)
            hits.append(Hit(hit.image_id, identity, *similarities, path or "", picture.content if picture else b""))
        return Hits(query, tuple(hits), confidence, self._approximate > 0)

    def model(self, device: str = "cpu") -> Model:
        """The model that made the gallery.

        Args:
            device: where it computes.

        Raises:
            UserError: there is no gallery, or its model is gone.
        """
        from ceca.search.edition import find_edition

        return Model(find_edition(self.store).model, self.store.uri, device)

    def _manifest(self, name: str) -> Manifest:
        manifest = self.store.manifest(name)
        if manifest is None:
            raise UserError(f"no table {name!r} in {self.store.uri}; there are: {', '.join(self.tables) or 'none'}")
        return manifest

    @functools.cached_property
    def _searcher(self) -> Searcher:
        from ceca.search.searcher import Searcher

        return Searcher(self.store, self._model, approximate=self._approximate)

    @functools.cached_property
    def _catalogue(self) -> Catalogue:
        from ceca.search.catalogue import Catalogue

        return Catalogue(self._searcher.edition)


@dataclasses.dataclass(frozen=True)
class Hit:
    """An image that a search found: what it is, why it was found, and its encoded bytes.

    `identity` is None where nobody said whose image it is. `source_path` is its path in the source.
    """

    image_id: str
    identity: int | None
    similarity: float
    global_similarity: float
    local_similarity: float
    source_path: str
    content: bytes = dataclasses.field(repr=False)

    @property
    def image(self) -> Image:
        """The decoded picture."""
        from ceca.datasets.images import open_image

        return open_image(self.content)


@dataclasses.dataclass(frozen=True)
class Hits(Sequence[Hit]):
    """The hits of a search, best first. A notebook shows their pictures.

    `confidence` is the probability that the first one shows the person asked for; None if the model was not calibrated
    (`ceca evaluate --split val`). `approximate` says whether better images may have been missed.
    """

    query: str
    hits: tuple[Hit, ...]
    confidence: float | None = None
    approximate: bool = False

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, number: Any) -> Any:
        return self.hits[number]

    def table(self) -> pa.Table:
        """The hits as rows, without their pictures."""
        rows = [dataclasses.asdict(hit) for hit in self.hits]
        return pa.table({name: [row[name] for row in rows] for name in _SHOWN})

    def __str__(self) -> str:
        lines = [f"{rank:>3} {hit.similarity:.3f} {hit.source_path}" for rank, hit in enumerate(self.hits, 1)]
        return "\n".join([f"“{self.query}”{self._told}", *lines])

    @property
    def _told(self) -> str:
        notes = ["approximate"] if self.approximate else []
        if self.confidence is not None:
            notes.append(f"confidence {self.confidence:.2f}{'' if self.hits else ': probably nobody'}")
        return f" ({', '.join(notes)})" if notes else ""

    def _repr_html_(self) -> str:
        from ceca.datasets.images import mime_type

        shown = []
        for hit in self.hits:
            data = f"data:{mime_type(hit.content)};base64,{base64.b64encode(hit.content).decode()}"
            path = html.escape(hit.source_path)
            shown.append(
                f'<figure style="display:inline-block;margin:4px"><img src="{data}" alt="{path}" title="{path}" '
                f'style="height:160px"><figcaption>{hit.similarity:.3f}</figcaption></figure>'
            )
        return f"<p>{html.escape(self.query)}{self._told}</p>{''.join(shown)}"


_SHOWN = [field.name for field in dataclasses.fields(Hit) if field.name != "content"]


class Model:
    """A published model. Embeddings are float32 and L2-normalised, so that inner products are cosines.

    Args:
        model: URI or path of the model, or its name in a dataset.
        data: URI of the dataset in which a name is looked up.
        device: where it computes.
        batch: images or texts that are embedded together.
    """

    def __init__(self, model: str, data: str = ".", device: str = "cpu", batch: int = 64):
        from ceca.model.weights import load_model

        self.ceca, self.published = load_model(Store(data), model, device)
        self.device, self.batch = device, batch

    def __repr__(self) -> str:
        return f"ceca.load({self.published.uri!r}): {self.ceca.config.backbone}@{self.published.digest}"

    def embed_gallery(
        self, images: Sequence[bytes | str | Path | Image], summaries: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed images as a gallery has them.

        Args:
            images: encoded bytes, paths or Pillow's images.
            summaries: the summary of each image; None embeds images alone.

        Returns:
            global [N, D] and local [N, E].

        Raises:
            UserError: there is not one summary per image.
            ceca.datasets.images.ImageError: an image cannot be decoded.
        """
        from ceca.datasets.images import decode_image
        from ceca.model.embed import embed_images

        if summaries is not None and len(summaries) != len(images):
            raise UserError(f"{len(images)} images and {len(summaries)} summaries: give one summary per image, or none")
        config = self.ceca.config
        parts = []
        for start in range(0, len(images), self.batch):
            some = slice(start, start + self.batch)
            pixels = [decode_image(_encoded(image), config.image_height, config.image_width) for image in images[some]]
            told = None if summaries is None else list(summaries[some])
            parts.append(embed_images(self.ceca, pixels, told, self.device))
        return self._joined(parts)

    def embed_queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embed descriptions: global [Q, D] and local [Q, E]."""
        from ceca.model.embed import embed_texts

        if isinstance(texts, str):
            raise UserError("embed_queries takes a list of texts: put the one text into a list")
        starts = range(0, len(texts), self.batch)
        return self._joined([embed_texts(self.ceca, list(texts[n : n + self.batch]), self.device) for n in starts])

    def _joined(self, parts: Sequence[tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        if not parts:
            raise UserError("nothing to embed: the list is empty")
        whole = [torch.cat(side).float().cpu().numpy() for side in zip(*parts, strict=True)]
        return whole[0], whole[1]


def similarity(
    queries: tuple[np.ndarray, np.ndarray], gallery: tuple[np.ndarray, np.ndarray], omega: float = 0.3
) -> np.ndarray:
    """Compare queries with images, [Q, N]: S = (1-ω)·cos_global + ω·cos_local.

    Args:
        queries: global and local embeddings of `Model.embed_queries`.
        gallery: global and local embeddings of `Model.embed_gallery`.
        omega: ω, the share of the local similarity.
    """
    fused: np.ndarray = (1 - omega) * queries[0] @ gallery[0].T + omega * queries[1] @ gallery[1].T
    return fused


def _quoted(text: str, mark: str) -> str:
    """A name or text as SQL writes it."""
    return mark + text.replace(mark, 2 * mark) + mark


def _encoded(image: bytes | str | Path | Image) -> bytes:
    """The bytes of an encoded image, whatever it is given as."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
