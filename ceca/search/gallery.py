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

from ceca.data.store import Manifest, Store, StoreError, version_of
from ceca.errors import UserError
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA, fused_similarity
from ceca.model.weights import load_weights
from ceca.search.edition import Edition, find_edition, read_added
from ceca.search.facets import Facets, open_facets
from ceca.search.ranking import Candidates, Hit, rank
from ceca.search.topk import gather
from ceca.search.topk import top_k as find_best
from ceca.training.augment import normalize

ROW_NORM = 2**0.5 * (1 + 2**-10)  # of two normalised halves, rounded to fp16
CACHED_DAYS = 30  # after which a shard that nobody opened is removed from this machine


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
            rerank_first: number of best images ranked again (`ceca.search.feedback`); they stay before the others, and
                their `similarity` is what they were ranked by.
        """
        found = self.candidates(
            query_global,
            query_local,
            omega=omega,
            top_k=max(top_k, rerank_first),
            allowed=allowed,
            with_rows=rerank_first > 0,
        )
        omegas = torch.as_tensor(omega, dtype=torch.float32).expand(len(query_global)).tolist()
        return [
            rank([own], top_k=top_k, omega=one, rerank_first=rerank_first, global_dim=self.global_dim)
            for own, one in zip(found, omegas, strict=True)
        ]

    def candidates(
        self,
        query_global: Tensor,
        query_local: Tensor,
        *,
        omega: float | Sequence[float],
        top_k: int,
        allowed: Tensor | None = None,
        with_rows: bool = False,
    ) -> list[Candidates]:
        """The best images for each query, for `rank` to put in order; arguments as of `search`."""
        if not self.shards:  # a share of nothing
            nothing = np.zeros(0, dtype=np.float32)
            no_rows = np.zeros((0, query_global.shape[1] + query_local.shape[1]), np.float16) if with_rows else None
            return [Candidates([], [], nothing, nothing, nothing, no_rows) for _ in query_global]
        if self.present is not None:
            allowed = self.present if allowed is None else allowed & self.present
        local_share = torch.as_tensor(omega, dtype=torch.float32).expand(len(query_global))[:, None]
        scaled = torch.cat([(1 - local_share) * query_global.float(), local_share * query_local.float()], dim=1)
        best = find_best(self.shards, scaled, top_k, row_norm=ROW_NORM, allowed=allowed)
        found = []
        for q in range(len(query_global)):
            there = best.row[q] >= 0
            rows, similarity = best.row[q][there], best.similarity[q][there]
            ascending, back = rows.sort()
            chosen = gather(self.shards, ascending)[back.argsort()]
            parts = chosen.float().split([self.global_dim, chosen.shape[1] - self.global_dim], dim=1)
            global_similarity, local_similarity = (
                (part @ query.float().to(part.device)).cpu().numpy()
                for part, query in zip(parts, (query_global[q], query_local[q]), strict=True)
            )
            numbers = rows.tolist()
            found.append(
                Candidates(
                    [self.ids[row] for row in numbers],
                    [self.identities[row] for row in numbers],
                    similarity.cpu().numpy(),
                    global_similarity,
                    local_similarity,
                    chosen.cpu().numpy() if with_rows else None,
                )
            )
        return found


def open_gallery(
    edition: Edition,
    device: str | torch.device = "cpu",
    *,
    neighbours: int = 0,
    omega: float = 0.3,
    share: tuple[int, int] = (0, 1),
) -> Gallery:
    """The gallery of an edition, or the part of it that a replica holds.

    On a CPU its shards are files in a folder of this machine, mapped into memory: made once, used by all processes.

    Args:
        neighbours: views of a person agree as in `agree_with_neighbours`; that compares all images with all and keeps
            a copy of the rows. omega: ω of that.
        share: (number, of how many): of the shards that are a share's, in turn.
    """
    number, shares = share
    manifest, store = edition.manifest("gallery"), edition.store
    sources: list[_Part | _Added] = [_Part(store, manifest, part) for part in range(len(manifest.parts))]
    sources += [_Added(edition, name) for name in edition.added]
    if neighbours and shares > 1:
        raise UserError("neighbours compares all images with all, so the gallery cannot be shared out: leave one out")
    ids: list[str] = []
    identities: list[int] = []
    seen: set[str] = set()
    present: list[bool] = []
    for source in sources[number::shares]:
        table = source.describe(["image_id", "identity"])
        names = table["image_id"].to_pylist()
        # While objects of `added` are joined into one, an image is in both for a moment.
        present += [name not in edition.removed_ids and name not in seen for name in names]
        seen.update(names)
        ids += names
        identities += table["identity"].to_pylist()
    shards = _open_shards(sources[number::shares], _cache(store), {source.digest for source in sources})
    global_dim = edition.global_dim
    if torch.device(device).type != "cpu" and shards:
        shards = [torch.cat(shards).to(device)]
    there = torch.tensor(present, dtype=torch.bool)
    if neighbours:
        rows = torch.cat(shards)[there].float()
        whole, local = rows.split([global_dim, rows.shape[1] - global_dim], dim=1)
        shards = [torch.cat(agree_with_neighbours((whole, local), neighbours, omega), dim=1).half()]
        ids, identities = ([column[row] for row in there.nonzero()[:, 0].tolist()] for column in (ids, identities))
        there = torch.ones(len(ids), dtype=torch.bool)
    return Gallery(ids, identities, shards, global_dim, None if there.all() else there)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of the gallery's table."""

    store: Store
    manifest: Manifest
    number: int

    @property
    def digest(self) -> str:
        return self.manifest.parts[self.number].sha256

    def describe(self, columns: list[str]) -> pa.Table:
        return self.store.read_columns(self.manifest, self.number, columns)

    def read(self, columns: list[str]) -> pa.Table:
        return self.store.read_part(self.manifest, self.number, columns)


@dataclasses.dataclass(frozen=True)
class _Added:
    """An object of what was added."""

    edition: Edition
    name: str

    @property
    def digest(self) -> str:
        return Path(self.name).stem

    def read(self, columns: list[str]) -> pa.Table:
        return read_added(self.edition.store, self.edition.digest, self.name, columns)

    describe = read


def _cache(store: Store) -> Path:
    """The folder of this machine for a dataset's shards."""
    place = Path(os.environ.get("CECA_CACHE") or Path(tempfile.gettempdir()) / f"ceca-{os.getuid()}")
    return place / "shards" / version_of(store.uri)


def _open_shards(sources: Sequence[_Part | _Added], folder: Path, current: set[str]) -> list[Tensor]:
    """The embeddings of each source, fp16 [n, D + E], mapped from files that are named for the sources' digests.

    Other files of this dataset go, for they hold images that were removed; those of other datasets when nobody has
    opened them for a month. Who has one of them mapped keeps what is in it.
    """
    try:
        shards = [torch.from_numpy(_shard(source, folder)) for source in sources]
        for file in folder.parent.glob("*/*"):
            mine, age = file.parent == folder and file.stem not in current, time.time() - file.stat().st_mtime
            killed = file.suffix == ".tmp" and age > 3600  # who wrote it
            if killed or (file.suffix == ".npy" and (mine or age > CACHED_DAYS * 86_400)):
                file.unlink(missing_ok=True)
    except FileNotFoundError:
        raise  # an object that was replaced
    except OSError as error:
        raise StoreError(f"cannot write in {folder} ({error}); set CECA_CACHE to a folder with room") from error
    return shards


def _shard(source: _Part | _Added, folder: Path) -> np.ndarray:
    path = folder / f"{source.digest}.npy"
    try:
        os.utime(path)  # used today
    except FileNotFoundError:
        table = source.read(["global", "local"])
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
        self.edition = find_edition(store, model)
        self.gallery = open_gallery(self.edition, device, neighbours=neighbours)
        self.model = load_weights(store, self.edition.model, self.edition.digest, device)
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
        return open_facets(self.edition, self.gallery.ids)


@torch.inference_mode()
def embed_texts(model: CECA, texts: list[str], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Queries → normalised global [Q, D] and local [Q, E], fp32."""
    return model.embed_queries(trim(tokenize(texts)).to(device))


@torch.inference_mode()
def embed_images(
    model: CECA, pixels: Sequence[np.ndarray], summaries: list[str] | None, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Decoded images, uint8 [H, W, 3] each → normalised global [N, D] and local [N, E].

    With their summaries as a gallery has them, without as a query.
    """
    images = normalize(torch.from_numpy(np.stack(pixels)).to(device))
    told = None if summaries is None else trim(tokenize(summaries)).to(device)
    return model.embed_gallery(images, told)


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
