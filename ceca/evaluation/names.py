"""Names of the figures of an evaluation, as tables and pictures print them. Imports nothing heavy."""

from __future__ import annotations

# Retrieval metrics by key (ceca.metrics.RetrievalMetrics), in the order of a table's columns.
METRICS = {
    "rank1": "Rank-1",
    "rank5": "Rank-5",
    "rank10": "Rank-10",
    "mean_average_precision": "mAP",
    "mean_inverse_negative_penalty": "mINP",
    "rsum": "Rsum",
}

SIMILARITIES = ("global", "local", "fused")
