"""Ranking of queries over a gallery, in this process or by Ray tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch

from ceca.evaluation.evaluation import Embedded
from ceca.machines import machines_for
from ceca.metrics import Matches, rank_embeddings, slices
from jobs.runtime.console import Track
from jobs.runtime.ray_session import connect

ALONE = 2**28  # similarities that this process computes without the cluster
TASK_ROWS = 512  # queries of one task


def rank(queries: Embedded, gallery: Embedded, omegas: list[float], rerank_first: int = 0) -> dict[float, np.ndarray]:
    """Rank every query over the whole gallery (`rank_embeddings`), by Ray tasks if there is much to compare.

    Args:
        queries: the side that asks.
        gallery: the side that is ranked.
        omegas: shares of the local similarity.
        rerank_first: number of best images of each query that are ranked again; 0 is off.

    Returns:
        ω → [Q, 8], columns `ceca.metrics.PER_QUERY`.
    """
    matches = Matches(queries.identities, gallery.identities)
    count, size = len(queries.identities), len(gallery.identities)
    if count * size <= ALONE:
        return rank_embeddings(queries.pair, gallery.pair, matches, omegas, rerank_first=rerank_first)
    connect()
    # Every task reads the gallery in place from the object store.
    shared = ray.put(([part.numpy() for part in gallery.pair], matches, omegas, rerank_first))
    with Track("evaluate", count, unit="queries") as track:
        pending = {}
        for rows in slices(count, TASK_ROWS):
            pending[_rank_rows.remote(tuple(part[rows] for part in queries.pair), shared, rows)] = rows
        parts = {}
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            rows = pending.pop(done)
            parts[rows.start] = ray.get(done)
            track.advance(rows.stop - rows.start)
    return {omega: np.concatenate([parts[start][omega] for start in sorted(parts)]) for omega in omegas}


@ray.remote(num_cpus=1, label_selector=machines_for("cpu"))
def _rank_rows(queries: Any, shared: Any, rows: slice) -> dict[float, np.ndarray]:
    torch.set_num_threads(1)
    gallery, matches, omegas, rerank_first = shared
    parts = [torch.from_numpy(part) for part in gallery]
    return rank_embeddings(queries, (parts[0], parts[1]), matches.of(rows), omegas, rerank_first=rerank_first)
