"""Metrics of the service for Prometheus, exported by Ray on every node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge, Histogram

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


class Metrics:
    """The metrics of one replica. Ray adds tags that name the replica."""

    def __init__(self) -> None:
        self.stages = Histogram("ceca_stage_seconds", "Latency by stage of a request", SECONDS, ("stage",))
        self.requests = Counter("ceca_requests", "Requests by route and status", ("route", "status"))
        self.waiting = Gauge("ceca_requests_in_flight", "Requests in progress or waiting on an ingress replica")
        self.batches = Histogram("ceca_batch_size", "Queries in one pass", SIZES, ("deployment",))
        self.images = Gauge("ceca_gallery_images", "Images that a search can find")
        self.arrivals = Gauge("ceca_arrivals_waiting", "Images acknowledged and not yet searchable")
        self.reranked = Counter("ceca_reranked", "Searches that asked for re-ranking, by what ranked them", ("by",))
        self.verdicts = Counter("ceca_verdicts", "Verdicts by where they came from", ("source",))
        self.problems = Counter("ceca_problems", "What went wrong behind the scenes", ("where",))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the duration of a stage; nothing is recorded if it raises."""
        started = time.perf_counter()
        yield
        self.stages.observe(time.perf_counter() - started, {"stage": name})
