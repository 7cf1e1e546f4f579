"""Time and memory of ranking every query over a gallery, against the bare matrix products and a top 10, in one run.

    python benchmarks/evaluate.py                       # 5,000 queries, 100,000 images, 512 + 1,024 numbers each

    bare       the products of all queries and images, a strip at a time, and the ten best of each query
    ranks      Rank-1, 5 and 10: `rank_embeddings(…, only_first=True)`
    all        Rank-1, 5 and 10 with exact mAP and mINP
    11 omegas  all of these for ω = 0.0, 0.1 … 1.0, as the ω curve needs

Embeddings are random and normalised. Memory is the peak beyond the memory that the embeddings take.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import in_own_process, machine, peak_memory, run_benchmark
from ceca.metrics import STRIP, Matches, rank_embeddings

ARMS = ("bare", "ranks", "all", "11 omegas")
OMEGA = 0.3


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of the ranking."""

    queries: int = 5_000
    images: int = 100_000
    images_per_identity: int = 5
    widths: tuple[int, int] = (512, 1024)
    """Of the global and of the local embedding."""


def main(settings: Settings) -> None:
    print(
        f"{settings.queries:,} queries, {settings.images:,} images, {settings.images_per_identity} of a person; "
        f"{machine()}, torch {torch.__version__}\n"
    )
    print(f"{'':10}{'seconds':>9}{'of bare':>9}{'memory beyond the embeddings':>31}")
    bare = 0.0
    with tempfile.TemporaryDirectory(prefix="ceca-benchmark-") as folder:
        for arm in ARMS:
            figures = in_own_process(__file__, arm, settings, Path(folder))
            bare = bare or figures["seconds"]
            ratio = figures["seconds"] / bare
            print(f"{arm:10}{figures['seconds']:9.2f}{ratio:8.2f}x{figures['memory'] / 1e6:28.0f} MB", flush=True)


def measure(arm: str, settings: Settings, folder: Path) -> dict[str, float]:
    """Seconds and memory of one arm; nothing is read from `folder`."""
    source = torch.Generator().manual_seed(0)

    def embeddings(rows: int) -> tuple[torch.Tensor, ...]:
        parts = [torch.empty(rows, width) for width in settings.widths]
        for part in parts:
            for chunk in part.split(4096):
                chunk.copy_(F.normalize(torch.randn(chunk.shape, generator=source), dim=1))
        return tuple(parts)

    queries, gallery = embeddings(settings.queries), embeddings(settings.images)
    people = settings.images // settings.images_per_identity
    identities = [torch.arange(rows) % people for rows in (settings.queries, settings.images)]
    torch.mm(queries[0][:64], gallery[0][:4096].T)  # starts torch's threads before the clock
    before, started = peak_memory(), time.perf_counter()
    if arm == "bare":
        strip = max(16, STRIP // settings.images)
        for start in range(0, settings.queries, strip):
            similarity = (1 - OMEGA) * queries[0][start : start + strip] @ gallery[0].T
            similarity.addmm_(OMEGA * queries[1][start : start + strip], gallery[1].T)
            similarity.topk(10, dim=1)
    else:
        omegas = [n / 10 for n in range(11)] if arm == "11 omegas" else [OMEGA]
        rank_embeddings(queries, gallery, Matches(*identities), omegas, only_first=arm == "ranks")  # type: ignore[arg-type]
    return {"seconds": time.perf_counter() - started, "memory": peak_memory() - before}


if __name__ == "__main__":
    run_benchmark(main, Settings, {arm: functools.partial(measure, arm) for arm in ARMS}, __doc__)
