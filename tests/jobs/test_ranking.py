"""Queries ranked in this process, and by tasks of a cluster."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch

from ceca.evaluation.evaluation import Embedded
from jobs.evaluations import ranking


@pytest.mark.slow
def test_queries_ranked_by_tasks_of_the_cluster_are_ranked_as_in_one_process(ray_cluster, monkeypatch):
    source = np.random.default_rng(0)

    def embedded(rows: int) -> Embedded:
        pair = tuple(torch.from_numpy(source.integers(-3, 4, (rows, 4)).astype(np.float32)) for _ in range(2))
        return Embedded(pair, source.integers(0, 9, rows))

    texts, images = embedded(50), embedded(40)
    alone = ranking.rank(texts, images, [0.0, 0.5])
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.nodes.address)
    monkeypatch.setattr(ranking, "ALONE", 0)
    monkeypatch.setattr(ranking, "TASK_ROWS", 25)
    try:
        together = ranking.rank(texts, images, [0.0, 0.5])
    finally:
        ray.shutdown()
    for omega, figures in alone.items():
        np.testing.assert_allclose(together[omega], figures, rtol=1e-12)
