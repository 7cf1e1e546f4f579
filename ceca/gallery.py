"""A gallery in memory and exact search over it.

A gallery image is one row `[g/|g| , l/|l|]`; scaling only the query by (1-ω, ω) makes the fused similarity one
inner product, so ω is chosen per query without another copy. Rows stay in fp16, the table's own precision.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from ceca.facets import Facets, open_facets
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA, fused_similarity
from ceca.model.weights import load_model
from ceca.rerank import rerank
from ceca.samples import removed_images
from ceca.store import Manifest, Store, StoreError
from ceca.topk import gather
from ceca.topk import top_k as find_best

ROW_NORM = 2**0.5 * (1 + 2**-10)  # of two normalised halves, rounded to fp16
CACHED_DAYS = 30  # after which a shard that nobody opened is removed from this machine


@dataclasses.dataclass(frozen=True)
class Hit:
    """One answer: the image, its identity, and the similarities it was ranked by."""

    image_id: str
    identity: int
    similarity: float
    global_similarity: float
    local_similarity: float


class Gallery:
    """The rows of a gallery table: ids, identities, and embeddings in fp16 shards [n, D + E].

    `present` [N] tells rows that may be found from those that were removed; None: all may.
    """

    def __init__(
        self,
        ids: Sequence[str],
        identities: Sequence[int],
        shards: Sequence[Tensor],
        global_dim: int,
        present: Tensor | None = None,
    ):
        self.ids, self.identities = list(ids), list(identities)
        self.shards, self.global_dim = list(shards), global_dim
        self.present = present

    def __len__(self) -> int:
        return len(self.ids)

    def search(
        self,
        query_global: Tensor,
        query_local: Tensor,
        *,
        omega: float | Sequence[float],
        top_k: int,
        allowed: Tensor | None = None,
        rerank_first: int = 0,
    ) -> list[list[Hit]]:
        """The best images for each query: normalised embeddings [Q, D], [Q, E] → Q lists of min(top_k, N) hits.

        Equal similarities come in the order of image ids.

        Args:
            omega: ω of all queries, or of each. allowed: [N] booleans, images that may be found; None: all that are
                present.
            rerank_first: so many best images are ranked again (`ceca.rerank`) and come before the others; `similarity`
                of a hit is then what it was ranked by.
        """
        if self.present is not None:
            allowed = self.present if allowed is None else allowed & self.present
        local_share = torch.as_tensor(omega, dtype=torch.float32).expand(len(query_global))[:, None]
        scaled = torch.cat([(1 - local_share) * query_global.float(), local_share * query_local.float()], dim=1)
        best = find_best(self.shards, scaled, max(top_k, rerank_first), row_norm=ROW_NORM, allowed=allowed)
        return [
            self._hits(
                query_global[q],
                query_local[q],
                best.similarity[q][best.row[q] >= 0],
                best.row[q][best.row[q] >= 0],
                rerank_first=rerank_first,
                omega=float(local_share[q]),
            )[:top_k]
            for q in range(len(query_global))
        ]

    def _hits(
        self,
        query_global: Tensor,
        query_local: Tensor,
        similarity: Tensor,
        rows: Tensor,
        *,
        rerank_first: int,
        omega: float,
    ) -> list[Hit]:
        """The rows of one query as hits, by similarity and then by image id; those ranked again before the others."""
        ascending, back = rows.sort()
        chosen = gather(self.shards, ascending)[back.argsort()].float()
        parts = chosen[:, : self.global_dim], chosen[:, self.global_dim :]
        if rerank_first and len(rows):
            first = (parts[0][None, :rerank_first], parts[1][None, :rerank_first])
            again = rerank(similarity[None, :rerank_first], first, omega)[0]
            similarity = torch.cat([again, similarity[rerank_first:]])
        global_parts, local_parts = (
            (part @ query.float().to(part.device)).tolist()
            for part, query in zip(parts, (query_global, query_local), strict=True)
        )
        found = zip(rows.tolist(), similarity.tolist(), global_parts, local_parts, strict=True)
        hits = [Hit(self.ids[row], self.identities[row], *values) for row, *values in found]

        def order(some: list[Hit]) -> list[Hit]:
            return sorted(some, key=lambda hit: (-hit.similarity, hit.image_id))

        return order(hits[:rerank_first]) + order(hits[rerank_first:])


def open_gallery(
    store: Store, device: str | torch.device = "cpu", *, neighbours: int = 0, omega: float = 0.3
) -> tuple[Gallery, Manifest]:
    """The current gallery of a dataset.

    On a CPU its shards are files in a folder of this machine, mapped into memory: made once, shared by all processes.
    With `neighbours`, views of a person agree as in `agree_with_neighbours`; that compares all images with all and
    keeps a copy of the rows.
    """
    manifest = store.current("gallery", "index")
    table = store.read(manifest, ["image_id", "identity"])
    ids, identities = table["image_id"].to_pylist(), table["identity"].to_pylist()
    removed = removed_images(store)
    present = torch.tensor([image_id not in removed for image_id in ids])
    shards = _shards(store, manifest)
    if torch.device(device).type != "cpu":
        shards = [torch.cat(shards).to(device)]
    global_dim = store.read_part(manifest, 0, ["global"]).schema.field("global").type.list_size
    if neighbours:
        rows = torch.cat(shards)[present].float()
        whole, local = rows.split([global_dim, rows.shape[1] - global_dim], dim=1)
        shards = [torch.cat(agree_with_neighbours((whole, local), neighbours, omega), dim=1).half()]
        ids, identities = ([column[row] for row in present.nonzero()[:, 0].tolist()] for column in (ids, identities))
        present = torch.ones(len(ids), dtype=torch.bool)
    return Gallery(ids, identities, shards, global_dim, None if present.all() else present), manifest


def _shards(store: Store, manifest: Manifest) -> list[Tensor]:
    """The embeddings of each part, fp16 [n, D + E], mapped from files that are named for the parts' digests."""
    folder = Path(os.environ.get("CECA_CACHE") or Path(tempfile.gettempdir()) / f"ceca-{os.getuid()}") / "shards"
    try:
        shards = [torch.from_numpy(_shard(store, manifest, part, folder)) for part in range(len(manifest.parts))]
        for file in folder.iterdir():  # who has one of them mapped keeps what is in it
            if time.time() - file.stat().st_mtime > CACHED_DAYS * 86_400:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write in {folder} ({error}); set CECA_CACHE to a folder with room") from error
    return shards


def _shard(store: Store, manifest: Manifest, part: int, folder: Path) -> np.ndarray:
    path = folder / f"{manifest.parts[part].sha256}.npy"
    try:
        os.utime(path)  # used today
    except FileNotFoundError:
        table = store.read_part(manifest, part, ["global", "local"])
        rows = np.concatenate([matrix(table, "global"), matrix(table, "local")], axis=1)
        aside = folder / f"{uuid.uuid4().hex}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                np.save(file, rows)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return np.load(path, mmap_mode="c")  # nothing writes to it; torch warns of arrays that cannot be written


def matrix(table: pa.Table, column: str) -> np.ndarray:
    """An embedding column as [N, D]."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    return np.concatenate(chunks).reshape(table.num_rows, -1)


class Searcher:
    """A model and a gallery made by it: text in, hits out. One process, no cluster."""

    def __init__(self, store: Store, model: str = "", device: str | torch.device = "cpu", *, neighbours: int = 0):
        self.store = store
        self.gallery, self.manifest = open_gallery(store, device, neighbours=neighbours)
        manifest = self.manifest
        self.model, published = load_model(store, model or manifest.notes["model"], device)
        self.model_digest = published.digest
        check_same_model(manifest, published.digest, published.uri)
        self.device = device

    def search(
        self,
        query: str,
        *,
        omega: float,
        top_k: int,
        where: Mapping[str, Sequence[str]] | None = None,
        rerank_first: int = 0,
    ) -> list[Hit]:
        """The best images, of those that have one of the values of every facet named in `where`."""
        allowed = self.facets.where(where) if where else None
        embeddings = embed_texts(self.model, [query], self.device)
        (hits,) = self.gallery.search(*embeddings, omega=omega, top_k=top_k, allowed=allowed, rerank_first=rerank_first)
        return hits

    @functools.cached_property
    def facets(self) -> Facets:
        return open_facets(self.store, self.manifest, self.gallery.ids)


def check_same_model(manifest: Manifest, digest: str, uri: str) -> None:
    """A query may only meet vectors of the model that embeds it."""
    if manifest.made_from["model"] != digest:
        raise StoreError(
            f"the gallery was made by model {manifest.made_from['model']}, but {uri} is {digest}; "
            "run the stage `index` with this model"
        )


@torch.inference_mode()
def embed_texts(model: CECA, texts: list[str], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Queries → normalised global [Q, D] and local [Q, E], fp32."""
    return model.embed_queries(trim(tokenize(texts)).to(device))


def agree_with_neighbours(
    gallery: tuple[Tensor, Tensor],
    neighbours: int,
    omega: float,
    *,
    weight: float = 0.5,
    temperature: float = 0.1,
    chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Let views of one person agree: each image's embeddings take part of those of the images most like it.

    e_i → normalise(e_i + weight · Σ_j a_ij·e_j) over the nearest j ≠ i by the fused similarity S of all images, with a
    the softmax of S/temperature over them, so that a stranger among them counts for less. No identity is looked at.
    What one view's summary misses, another's brings in (database-side augmentation).

    Args:
        gallery: normalised (global, local) embeddings, [N, ·] each. neighbours: how many, at least 1.
        omega: ω of S. weight: share of the neighbours. chunk: images compared with all at once.

    Returns:
        Normalised (global, local) embeddings of the same shapes.
    """
    count = min(neighbours, len(gallery[0]) - 1)
    if count < 1:
        return gallery
    found = [torch.empty_like(part) for part in gallery]
    for start in range(0, len(gallery[0]), chunk):
        rows = slice(start, start + chunk)
        similarity = fused_similarity((gallery[0][rows], gallery[1][rows]), gallery, omega)
        own = torch.arange(len(similarity), device=similarity.device)
        similarity[own, start + own] = -torch.inf
        values, nearest = similarity.topk(count, dim=1)
        shares = weight * (values / temperature).softmax(dim=1)[..., None]
        for part, new in zip(gallery, found, strict=True):
            new[rows] = F.normalize(part[rows] + (shares * part[nearest]).sum(dim=1), dim=1)
    return found[0], found[1]
