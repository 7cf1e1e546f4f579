"""Exact search over a gallery against reading its bytes once, and against faiss and NumPy, in one run.

    pip install faiss-cpu==1.15.1                       # for its rows of the table
    python benchmarks/gallery.py                        # 10^4, 10^5 and 10^6 images of 512 + 1,024 numbers
    python benchmarks/gallery.py --images 1000000

    reading        the fp16 rows once, all threads: what no exact search of one query can beat
    ceca           `Gallery.search`: fp16 rows mapped from files, top 10, every hit with its parts
    ceca rerank    the same, the best 50 ranked again
    faiss fp16     IndexScalarQuantizer of QT_fp16, a part per thread searched at once (IndexShards)
    faiss fp32     IndexFlatIP, twice the memory
    NumPy          fp16 rows converted a block at a time, matrix product, argpartition

Times are the fastest of several searches after the first; throughput is of 64 queries at once, beside it how many times
that of one by one. Each way runs in a process of its own; memory is the most it held beyond Python and its libraries,
of the rows' bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.evaluate import most

ARMS = ("reading", "ceca", "ceca rerank", "faiss fp16", "faiss fp32", "NumPy")
WIDTHS = (512, 1024)
BATCH, TOP_K, OMEGA, RERANKED = 64, 10, 0.3, 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many images."""

    images: tuple[int, ...] = (10_000, 100_000, 1_000_000)


def main(settings: Settings) -> None:
    print(f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}, top {TOP_K}")
    for images in settings.images:
        with tempfile.TemporaryDirectory(prefix="ceca-gallery-") as folder:
            size = prepare(Path(folder), images)
            print(f"\n{images:,} images, {size / 1e9:.3f} GB of fp16 rows")
            headings = ("one query", "of reading", "64 queries", "of ones", "memory", "same hits")
            print(f"{'':12}" + "".join(f"{heading:>12}" for heading in headings))
            reading, hits = 0.0, None
            for arm in ARMS:
                finished = subprocess.run(
                    [sys.executable, __file__, "--arm", arm, folder], check=False, capture_output=True, text=True
                )
                if finished.returncode:
                    print(f"{arm:12} failed: {finished.stderr.strip().splitlines()[-1]}")
                    continue
                found = json.loads(finished.stdout.splitlines()[-1])
                reading = reading or found["one"]
                line = f"{arm:12}{1000 * found['one']:9.2f} ms{found['one'] / reading:11.2f}x"
                if "many" in found:
                    hits = hits or found["hits"]
                    same = np.mean([len(set(a) & set(b)) / TOP_K for a, b in zip(found["hits"], hits, strict=True)])
                    rate = BATCH / found["many"]
                    line += f"{rate:10,.0f}/s{rate * found['one']:11.1f}x{found['memory'] / size:11.2f}x{same:12.1%}"
                print(line, flush=True)


def prepare(folder: Path, images: int) -> int:
    """Rows in a file, queries in another; the rows' bytes."""
    source = torch.Generator().manual_seed(0)

    def embeddings(rows: int) -> list[torch.Tensor]:
        return [F.normalize(torch.randn(rows, width, generator=source), dim=1) for width in WIDTHS]

    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (images, sum(WIDTHS)))
    for start in range(0, images, 8192):
        rows[start : start + 8192] = torch.cat(embeddings(min(8192, images - start)), dim=1).numpy()
    rows.flush()
    torch.save(embeddings(BATCH), folder / "queries.pt")
    return rows.nbytes


def run_arm(arm: str, folder: Path) -> None:
    queries: list[torch.Tensor] = torch.load(folder / "queries.pt", weights_only=True)
    scaled = torch.cat([(1 - OMEGA) * queries[0], OMEGA * queries[1]], dim=1)
    search: Callable[[int], Any]
    if arm.startswith("faiss"):
        import faiss  # noqa: F401  before memory is measured
    if arm.startswith("ceca"):
        import ceca.search.gallery  # noqa: F401
    before = most()
    if arm == "reading":
        words = torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="c")).view(torch.int64)
        print(json.dumps({"one": min(timed(words.sum), timed(words.max))}))
        return
    if arm.startswith("ceca"):
        search = ceca_search(folder, queries, RERANKED if "rerank" in arm else 0)
    elif arm == "NumPy":
        search = numpy_search(np.load(folder / "rows.npy", mmap_mode="r"), scaled.numpy())
    else:
        search = faiss_search(arm, np.load(folder / "rows.npy", mmap_mode="r"), scaled.numpy())
    found: dict[str, Any] = {"hits": search(BATCH)}
    found |= {"one": timed(lambda: search(1)), "many": timed(lambda: search(BATCH), 9)}
    print(json.dumps({**found, "memory": most() - before}))


def timed(call: Callable[[], Any], times: int = 9) -> float:
    """The fastest of some calls, after one that warms up: what others do on the machine only makes it slower."""
    call()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def ceca_search(folder: Path, queries: list[torch.Tensor], rerank: int = 0) -> Callable[[int], Any]:
    from ceca.search.gallery import Gallery

    rows = torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="c"))
    gallery = Gallery([f"{n:08d}" for n in range(len(rows))], range(len(rows)), rows.split(2**18), WIDTHS[0])

    def search(count: int) -> list[list[int]]:
        asked = (queries[0][:count], queries[1][:count])
        found = gallery.search(*asked, omega=OMEGA, top_k=TOP_K, rerank_first=rerank)
        return [[hit.identity for hit in hits] for hits in found]

    return search


def faiss_search(arm: str, rows: np.ndarray, queries: np.ndarray) -> Callable[[int], Any]:
    import faiss

    def index() -> Any:
        if arm == "faiss fp32":
            return faiss.IndexFlatIP(rows.shape[1])
        return faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)

    parts = [index() for _ in range(1 if arm == "faiss fp32" else os.cpu_count() or 1)]
    bounds = np.linspace(0, len(rows), len(parts) + 1).astype(int)
    for part, low, high in zip(parts, bounds, bounds[1:], strict=False):
        for start in range(low, high, 8192):
            part.add(rows[start : min(start + 8192, high)].astype(np.float32))
    whole = parts[0]
    if len(parts) > 1:
        whole = faiss.IndexShards(rows.shape[1], True, True)  # in threads, numbered one after the other
        for part in parts:
            whole.add_shard(part)
    return lambda count: whole.search(queries[:count], TOP_K)[1].tolist()


def numpy_search(rows: np.ndarray, queries: np.ndarray) -> Callable[[int], Any]:
    def search(count: int) -> list[list[int]]:
        similarity = np.empty((count, len(rows)), np.float32)
        for start in range(0, len(rows), 4096):
            block = rows[start : start + 4096].astype(np.float32)
            np.matmul(queries[:count], block.T, out=similarity[:, start : start + len(block)])
        best = np.argpartition(similarity, -TOP_K, axis=1)[:, -TOP_K:]
        return best.tolist()

    return search


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        run_arm(sys.argv[2], Path(sys.argv[3]))
    else:
        main(tyro.cli(Settings))
