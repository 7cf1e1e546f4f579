"""A gallery in memory and exact search over it.

A gallery image is one row `[g/|g| , l/|l|]`; scaling only the query by (1-ω, ω) makes the fused similarity one
inner product, so ω is chosen per query without another copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA, fused_similarity
from ceca.model.weights import load_model
from ceca.store import Manifest, Store, StoreError


@dataclasses.dataclass(frozen=True)
class Hit:
    """One answer: the image, its identity, and the similarities it was ranked by."""

    image_id: str
    identity: int
    similarity: float
    global_similarity: float
    local_similarity: float


class Gallery:
    """The rows of a gallery table: ids, identities, and embeddings [N, D + E]."""

    def __init__(self, ids: Sequence[str], identities: Sequence[int], embeddings: Tensor, global_dim: int):
        self.ids, self.identities = list(ids), list(identities)
        self.embeddings, self.global_dim = embeddings, global_dim

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, query_global: Tensor, query_local: Tensor, *, omega: float, top_k: int) -> list[list[Hit]]:
        """The best images for each query: normalised embeddings [Q, D], [Q, E] → Q lists of min(top_k, N) hits.

        Equal similarities come in the order of image ids.
        """
        scaled = torch.cat([(1 - omega) * query_global, omega * query_local], dim=1).to(self.embeddings)
        similarity = scaled @ self.embeddings.T
        best = similarity.topk(min(top_k, len(self)), dim=1).indices
        return [self._hits(query_global[q], query_local[q], similarity[q], rows) for q, rows in enumerate(best)]

    def _hits(self, query_global: Tensor, query_local: Tensor, similarity: Tensor, rows: Tensor) -> list[Hit]:
        chosen = self.embeddings[rows].float()
        global_parts = (chosen[:, : self.global_dim] @ query_global.float().to(chosen.device)).tolist()
        local_parts = (chosen[:, self.global_dim :] @ query_local.float().to(chosen.device)).tolist()
        hits = [
            Hit(self.ids[row], self.identities[row], float(similarity[row]), global_part, local_part)
            for row, global_part, local_part in zip(rows.tolist(), global_parts, local_parts, strict=True)
        ]
        return sorted(hits, key=lambda hit: (-hit.similarity, hit.image_id))


def open_gallery(store: Store, device: str | torch.device = "cpu") -> tuple[Gallery, Manifest]:
    """The current gallery of a dataset, in fp32 on a CPU and in fp16 on a GPU."""
    manifest = store.current("gallery", "index")
    table = store.read(manifest)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    parts = [torch.from_numpy(matrix(table, name)).to(device, dtype) for name in ("global", "local")]
    ids, identities = table["image_id"].to_pylist(), table["identity"].to_pylist()
    return Gallery(ids, identities, torch.cat(parts, dim=1), parts[0].shape[1]), manifest


def matrix(table: pa.Table, column: str) -> np.ndarray:
    """An embedding column as [N, D]."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    return np.concatenate(chunks).reshape(table.num_rows, -1)


class Searcher:
    """A model and a gallery made by it: text in, hits out. One process, no cluster."""

    def __init__(self, store: Store, model: str = "", device: str | torch.device = "cpu"):
        self.gallery, manifest = open_gallery(store, device)
        self.version = manifest.version
        self.model, published = load_model(store, model or manifest.notes["model"], device)
        self.model_digest = published.digest
        check_same_model(manifest, published.digest, published.uri)
        self.device = device

    def search(self, query: str, *, omega: float, top_k: int) -> list[Hit]:
        embeddings = embed_texts(self.model, [query], self.device)
        return self.gallery.search(*embeddings, omega=omega, top_k=top_k)[0]


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
        itself = torch.arange(start, start + len(similarity))
        similarity[torch.arange(len(similarity)), itself] = -torch.inf
        values, nearest = similarity.topk(count, dim=1)
        shares = weight * (values / temperature).softmax(dim=1)[..., None]
        for part, new in zip(gallery, found, strict=True):
            new[rows] = F.normalize(part[rows] + (shares * part[nearest]).sum(dim=1), dim=1)
    return found[0], found[1]
