"""A gallery in memory and exact search over it.

A gallery image is one row `[g/|g| , l/|l|]`; scaling only the query by (1-ω, ω) makes the fused similarity one
inner product, so ω is chosen per query without another copy. Rows stay in fp16, the table's own precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ceca.errors import UserError
from ceca.search.agreement import agree_with_neighbours
from ceca.search.edition import Edition
from ceca.search.ranking import Candidates, Hit, rank
from ceca.search.shards import AddedObject, StoredPart, open_shards, shards_folder, sweep
from ceca.search.topk import gather
from ceca.search.topk import top_k as find_best

ROW_NORM = 2**0.5 * (1 + 2**-10)  # of two normalised halves, rounded to fp16


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
    sources: list[StoredPart | AddedObject] = [StoredPart(store, manifest, part) for part in range(len(manifest.parts))]
    sources += [AddedObject(edition, name) for name in edition.added]
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
    folder = shards_folder(store)
    shards = open_shards(sources[number::shares], folder)
    sweep(folder, {source.digest for source in sources})
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
