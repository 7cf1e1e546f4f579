"""A gallery in memory, and search over it: exact, or approximate where that is asked for.

A gallery image is one row `[g/|g| , l/|l|]`. Scaling only the query by (1-ω, ω) makes the fused similarity one inner
product, so each query can have its own ω without another copy of the rows. Rows stay in fp16, as in the table; on a CPU
they are also held in 8 bits, which a search reads first (`ceca.search.rounding`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ceca.data.files import sweep
from ceca.data.keys import spelled
from ceca.errors import UserError
from ceca.search.agreement import agree_with_neighbours
from ceca.search.edition import Edition
from ceca.search.ranking import Candidates, Hit, rank
from ceca.search.rounding import Rounded
from ceca.search.shards import open_names, open_rounded, open_shards, open_sketches, shards_folder
from ceca.search.sketches import Sketches, find_near, sketch_all
from ceca.search.sources import StoredPart, list_sources
from ceca.search.topk import Best, Rows
from ceca.search.topk import top_k as find_best

TOGETHER = 16_384  # rows whose similarities are taken apart at a time


class Gallery:
    """The N rows of a gallery.

    Args:
        ids: [N] uint64, the image id of each row as a number (`ceca.data.keys`).
        identities: [N] int64.
        shards: embeddings of the rows, fp16 [n, D + E] each.
        global_dim: width D of the global embeddings.
        present: [N] booleans, false for rows that were removed; None means that all rows may be found.
        rounded: on a CPU, the same rows in 8 bits; None makes them.
        approximate: share of the rows that an approximate search compares exactly (`ceca.search.sketches`); 0 is off.
        sketches: of the rows, for approximate search; None makes them.

    Raises:
        UserError: an approximate search is asked for, and the rows are on a GPU.
    """

    def __init__(
        self,
        ids: np.ndarray,
        identities: np.ndarray,
        shards: Sequence[Tensor],
        global_dim: int,
        present: Tensor | None = None,
        rounded: Sequence[Rounded] | None = None,
        *,
        approximate: float = 0.0,
        sketches: Sketches | None = None,
    ):
        if approximate and any(rows.device.type != "cpu" for rows in shards):
            raise UserError("approximate search is made for CPUs, and the gallery is on a GPU: leave one of them out")
        self.ids, self.identities = ids, identities
        self.rows, self.global_dim = Rows(shards, rounded), global_dim
        self.present = present
        self.approximate, self.sketches = approximate, sketches
        if approximate and sketches is None and len(self):
            self.sketches = sketch_all(self.rows)

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, allowed: Tensor | None = None) -> int:
        """Number of images that a search can find, all or those of `allowed` [N]."""
        if self.present is not None:
            allowed = self.present if allowed is None else allowed & self.present
        return len(self) if allowed is None else int(allowed.sum())

    def exact(self) -> Gallery:
        """The same gallery, searched exactly."""
        exact = copy.copy(self)
        exact.approximate, exact.sketches = 0.0, None
        return exact

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
        """Find the best images for each query. Equal similarities are sorted by image id.

        Args:
            query_global: [Q, D] normalised global embeddings.
            query_local: [Q, E] normalised local embeddings.
            omega: ω of all queries, or one per query.
            top_k: number of hits per query.
            allowed: [N] booleans, images that may be found; None means all that were not removed.
            rerank_first: number of best images ranked again (`ceca.search.feedback`). They stay ahead of the others,
                and their `similarity` is the new one; 0 is off.

        Returns:
            Q lists of at most top_k hits, best first.
        """
        candidates = self.candidates(
            query_global,
            query_local,
            omega=omega,
            top_k=max(top_k, rerank_first),
            allowed=allowed,
            with_rows=rerank_first > 0,
        )
        omegas = torch.as_tensor(omega, dtype=torch.float32).expand(len(query_global)).tolist()
        return [
            rank([of_query], top_k=top_k, omega=query_omega, rerank_first=rerank_first, global_dim=self.global_dim)
            for of_query, query_omega in zip(candidates, omegas, strict=True)
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
        """Find the best images for each query, for `rank` to merge.

        Args:
            query_global: [Q, D] normalised global embeddings.
            query_local: [Q, E] normalised local embeddings.
            omega: ω of all queries, or one per query.
            top_k: number of candidates per query.
            allowed: [N] booleans, images that may be found; None means all that were not removed.
            with_rows: also return the images' embeddings, for re-ranking.

        Returns:
            Q sets of at most top_k candidates.
        """
        if not len(self):  # a gallery with more shards than objects leaves some shards empty
            nothing = np.zeros(0, dtype=np.float32)
            no_rows = np.zeros((0, query_global.shape[1] + query_local.shape[1]), np.float16) if with_rows else None
            return [Candidates([], [], nothing, nothing, nothing, no_rows) for _ in query_global]
        if self.present is not None:
            allowed = self.present if allowed is None else allowed & self.present
        omegas = torch.as_tensor(omega, dtype=torch.float32).expand(len(query_global))[:, None]
        scaled = torch.cat([(1 - omegas) * query_global.float(), omegas * query_local.float()], dim=1)
        if self.sketches is not None:
            best = find_near(self.rows, self.sketches, scaled, top_k, self.approximate, allowed)
        else:
            best = find_best(self.rows, scaled, top_k, allowed)
        step = max(1, TOGETHER // top_k)
        candidates: list[Candidates] = []
        for start in range(0, len(scaled), step):
            some = slice(start, start + step)
            found = Best(best.similarity[some], best.row[some])
            candidates += self._candidates(query_global[some], query_local[some], found, with_rows)
        return candidates

    def _candidates(
        self, query_global: Tensor, query_local: Tensor, best: Best, with_rows: bool
    ) -> Iterator[Candidates]:
        """The candidates of queries whose best rows are known."""
        chosen = self.rows.gather(best.row.clamp(min=0))
        parts = chosen.split([self.global_dim, chosen.shape[2] - self.global_dim], dim=2)
        similarities = [
            (part.float() @ query.float().to(part.device)[:, :, None]).squeeze(2)
            for part, query in zip(parts, (query_global, query_local), strict=True)
        ]
        similarity, global_similarity, local_similarity = (
            part.cpu().numpy() for part in (best.similarity, *similarities)
        )
        rows = chosen.cpu().numpy() if with_rows else None
        for q, numbers in enumerate(best.row.cpu().numpy()):
            valid = numbers >= 0  # -1 fills up where fewer than k rows are allowed
            yield Candidates(
                spelled(self.ids[numbers[valid]]),
                self.identities[numbers[valid]].tolist(),
                similarity[q][valid],
                global_similarity[q][valid],
                local_similarity[q][valid],
                None if rows is None else rows[q][valid],
            )


def open_gallery(
    edition: Edition,
    device: str | torch.device = "cpu",
    *,
    neighbours: int = 0,
    omega: float = 0.3,
    shard: tuple[int, int] = (0, 1),
    approximate: float = 0.0,
) -> Gallery:
    """Open the gallery of an edition, or one shard of it.

    On a CPU the embeddings are files on this machine, mapped into memory: made once, used by all processes. A
    number takes 1 byte in the 8-bit file, which a search reads whole, and 2 bytes in the fp16 file. It
    reads only a few rows of that file.

    Args:
        edition: the edition.
        device: device of the embeddings.
        neighbours: number of nearest images averaged into each embedding (`agree_with_neighbours`); 0 is off. Compares
            all images with all, and keeps a copy of the rows in memory.
        omega: ω of that comparison.
        shard: (number, count). The gallery is split into `count` shards; shard `number`, from 0, holds every
            count-th stored object.
        approximate: share of the rows that an approximate search compares exactly (`ceca.search.sketches`); 0 is off.
            Sketches are a file of this machine, too. With `neighbours` they are made of the averaged rows, in memory.

    Raises:
        UserError: neighbours are asked for, and the gallery is split; or approximate search on a GPU.
        StoreError: a table of the edition is gone, or the folder of the shards cannot be written.
        FileNotFoundError: an object of `added` was replaced in the meantime.
    """
    number, count = shard
    sources = list_sources(edition, "gallery")
    if neighbours and count > 1:
        raise UserError("neighbours compares all images with all, so the gallery cannot be split: leave one out")
    held = sources[number::count]
    folder = shards_folder(edition.store)
    named = open_names(held, folder)
    # While objects of `added` are joined into one, an image is in two of them: its first row counts.
    once = np.zeros(len(named), np.bool_)
    once[np.unique(named["id"], return_index=True)[1]] = True
    present = torch.from_numpy(once & ~edition.is_removed(named["id"]))
    on_cpu = torch.device(device).type == "cpu"
    shards = open_shards(held, folder)
    rounded = open_rounded(held, shards, folder) if on_cpu and not neighbours else None
    sweep(folder, {source.digest for source in sources})
    global_dim = edition.global_dim
    if not on_cpu and shards:
        shards = [torch.cat(shards).to(device)]
    if neighbours:
        rows = torch.cat(shards)[present].float()
        pair = rows[:, :global_dim], rows[:, global_dim:]
        shards = [torch.cat(agree_with_neighbours(pair, neighbours, omega), dim=1).half()]
        named, present = named[present.numpy()], torch.ones(int(present.sum()), dtype=torch.bool)
    sketches = None
    if approximate and rounded:
        parts = [source.digest for source in held if isinstance(source, StoredPart)]
        sketches = open_sketches(parts, Rows(shards, rounded), folder)
    ids, identities = named["id"].copy(), named["identity"].copy()
    return Gallery(
        *(ids, identities, shards, global_dim, None if present.all() else present, rounded),
        approximate=approximate,
        sketches=sketches,
    )
