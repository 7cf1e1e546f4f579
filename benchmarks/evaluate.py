"""Time and memory of ranking every query over a gallery, against the bare matrix products and a top-k, in one run.

    python benchmarks/evaluate.py                       # 5,000 queries, 100,000 images, 512 + 1,024 numbers each

    bare       the products of all queries and images a strip at a time, and the ten best of each query
    ranks      Rank-1, 5 and 10: `rank_embeddings(…, only_first=True)`
    all        with exact mAP and mINP
    11 omegas  all of them for ω = 0.0, 0.1 … 1.0: what the ω curve takes

Embeddings are random and normalised; each way runs in a process of its own. Memory is the most that it held beyond what
it had with the embeddings in place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from ceca.metrics import STRIP, Matches, rank_embeddings

ARMS = ("bare", "ranks", "all", "11 omegas")
OMEGA = 0.3


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is ranked."""

    queries: int = 5_000
    images: int = 100_000
    images_per_identity: int = 5
    widths: tuple[int, int] = (512, 1024)


def main(settings: Settings) -> None:
    print(
        f"{settings.queries:,} queries, {settings.images:,} images, {settings.images_per_identity} of a person; "
        f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}\n"
    )
    print(f"{'':10}{'seconds':>9}{'of bare':>9}{'memory beyond the embeddings':>31}")
    bare = 0.0
    for arm in ARMS:
        command = [sys.executable, __file__, "--arm", arm, json.dumps(dataclasses.asdict(settings))]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        bare = bare or found["seconds"]
        print(f"{arm:10}{found['seconds']:9.2f}{found['seconds'] / bare:8.2f}x{found['memory'] / 1e6:28.0f} MB")


def run_arm(arm: str, settings: Settings) -> None:
    source = torch.Generator().manual_seed(0)

    def embeddings(rows: int) -> tuple[torch.Tensor, ...]:
        made = [torch.empty(rows, width) for width in settings.widths]
        for part in made:
            for chunk in part.split(4096):
                chunk.copy_(F.normalize(torch.randn(chunk.shape, generator=source), dim=1))
        return tuple(made)

    queries, gallery = embeddings(settings.queries), embeddings(settings.images)
    people = settings.images // settings.images_per_identity
    identities = [torch.arange(rows) % people for rows in (settings.queries, settings.images)]
    torch.mm(queries[0][:64], gallery[0][:4096].T)  # the threads are there
    before, started = most(), time.perf_counter()
    if arm == "bare":
        strip = max(16, STRIP // settings.images)
        for start in range(0, settings.queries, strip):
            similarity = (1 - OMEGA) * queries[0][start : start + strip] @ gallery[0].T
            similarity.addmm_(OMEGA * queries[1][start : start + strip], gallery[1].T)
            similarity.topk(10, dim=1)
    else:
        omegas = [n / 10 for n in range(11)] if arm == "11 omegas" else [OMEGA]
        rank_embeddings(queries, gallery, Matches(*identities), omegas, only_first=arm == "ranks")  # type: ignore[arg-type]
    print(json.dumps({"seconds": time.perf_counter() - started, "memory": most() - before}))


def most() -> int:
    """Most bytes this process has held; getrusage would begin with what its parent held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        plain = json.loads(sys.argv[3])
        run_arm(sys.argv[2], Settings(**{**plain, "widths": tuple(plain["widths"])}))
    else:
        main(tyro.cli(Settings))
