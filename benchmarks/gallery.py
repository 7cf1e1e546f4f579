"""Search over a gallery against reading its bytes once, and against faiss and NumPy, in one run.

    pip install faiss-cpu==1.15.1                       # for its rows of the table
    python benchmarks/gallery.py                        # 10^4, 10^5 and 10^6 images of 512 + 1,024 numbers
    python benchmarks/gallery.py --images 1000000
    python benchmarks/gallery.py --images 1000000 --clustered --arms reading ceca "ceca approximate"

    reading        reads the fp16 rows once with all threads; no exact search of one query can be faster
    ceca           `Gallery.search`: rows in 8 bits, then fp16 rows mapped from files; top 10, each hit with its global
                   and local similarity
    ceca approximate
                   the same by sketches, and a share of the rows (`--share`) compared exactly
    ceca rerank    the same as ceca, and the best 50 are ranked again
    faiss fp16     IndexScalarQuantizer with QT_fp16; each thread searches one part (IndexShards)
    faiss fp32     IndexFlatIP, twice the memory
    NumPy          converts fp16 rows block by block, matrix product, argpartition

Times are the fastest of several searches after the first. "of reading" compares with reading in the same process, in
turns with the search: the speed of memory changes while other programs run. Throughput is measured with 64 queries at
once; the column beside it compares it with one query after the other. Memory is the peak beyond Python and its
libraries, as a multiple of the rows' bytes. "opening" is the time in which the arm makes what it searches, from the
fp16 rows.

With `--clustered`, images are of people and people have attributes, in descending frequency: an embedding is the sum of
what all share, the attributes, the person and the view, each as large as the attributes, and a query is a person and
noise of the same size. Otherwise rows are random. "same hits" is the recall against exact search.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import ArmFailed, fastest, fastest_each, in_own_process, machine, peak_memory, run_benchmark

ARMS = ("reading", "ceca", "ceca approximate", "ceca rerank", "faiss fp16", "faiss fp32", "NumPy")
WIDTHS = (512, 1024)
BATCH, TOP_K, OMEGA, RERANKED = 64, 10, 0.3, 50
ATTRIBUTES, VIEWS = (2, 10, 10, 6, 5, 4, 4, 3, 3, 2), 5  # values of each attribute of a person; images of a person


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is searched, and how."""

    images: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Sizes of the gallery, in images; a table each."""
    clustered: bool = False
    """Rows of people with attributes, as a model's are, instead of random ones."""
    share: float = 0.005
    """Share of the rows that the approximate search compares exactly."""
    arms: tuple[str, ...] = ARMS
    """Rows of the table."""


def main(settings: Settings) -> None:
    print(f"{machine()}, torch {torch.__version__}, top {TOP_K}")
    for images in settings.images:
        with tempfile.TemporaryDirectory(prefix="ceca-gallery-") as folder:
            size = prepare(Path(folder), images, settings.clustered)
            print(f"\n{images:,} images, {size / 1e9:.3f} GB of fp16 rows")
            headings = ("one query", "of reading", "64 queries", "of ones", "memory", "same hits", "opening")
            print(f"{'':16}" + "".join(f"{heading:>12}" for heading in headings))
            hits = None
            for arm in settings.arms:
                try:
                    figures = in_own_process(__file__, arm, settings, Path(folder))
                except ArmFailed as error:
                    print(f"{arm:16} failed: {str(error).splitlines()[-1]}")
                    continue
                line = f"{arm:16}{1000 * figures['one']:9.2f} ms{figures['one'] / figures['reading']:11.2f}x"
                if "many" in figures:
                    hits = hits or figures["hits"]
                    same = np.mean([len(set(a) & set(b)) / TOP_K for a, b in zip(figures["hits"], hits, strict=True)])
                    rate, memory = BATCH / figures["many"], figures["memory"] / size
                    line += f"{rate:10,.0f}/s{rate * figures['one']:11.1f}x{memory:11.2f}x{same:12.2%}"
                    line += f"{figures['opening']:10.1f} s"
                print(line, flush=True)


def prepare(folder: Path, images: int, clustered: bool) -> int:
    """Write rows and queries to files; return the bytes of the rows."""
    source = torch.Generator().manual_seed(0)
    people = People(max(1, images // VIEWS), source) if clustered else None

    def embeddings(rows: int, asked: bool = False) -> list[torch.Tensor]:
        if people is not None:
            return people.embeddings(rows, asked)
        return [F.normalize(torch.randn(rows, width, generator=source), dim=1) for width in WIDTHS]

    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (images, sum(WIDTHS)))
    for start in range(0, images, 8192):
        rows[start : start + 8192] = torch.cat(embeddings(min(8192, images - start)), dim=1).numpy()
    rows.flush()
    torch.save(embeddings(BATCH, asked=True), folder / "queries.pt")
    return rows.nbytes


class People:
    """People with attributes, and embeddings of their images and descriptions.

    Args:
        count: number of people.
        source: of random numbers.
    """

    def __init__(self, count: int, source: torch.Generator):
        self.count, self.source = count, source
        frequencies = [1 / torch.arange(1, values + 1) for values in ATTRIBUTES]
        self.codes = [torch.multinomial(each, count, replacement=True, generator=source) for each in frequencies]
        self.values = [[self._noise(values, width) for values in ATTRIBUTES] for width in WIDTHS]
        self.common = [2 * self._noise(1, width) for width in WIDTHS]
        # Of a person's and a view's directions, some vary much more than others, as in a trained model.
        self.spectra = [F.normalize((1 + torch.arange(width) / 16) ** -0.5, dim=0) * width**0.5 for width in WIDTHS]

    def _noise(self, rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=self.source)

    def embeddings(self, rows: int, asked: bool) -> list[torch.Tensor]:
        """Normalised embeddings of random people: images, or descriptions that are asked for."""
        who = torch.randint(0, self.count, (rows,), generator=self.source)
        parts = []
        for width, values, common, spectrum in zip(WIDTHS, self.values, self.common, self.spectra, strict=True):
            said = sum((value[codes[who]] for value, codes in zip(values, self.codes, strict=True)), torch.zeros(()))
            # A person's own part is drawn again from the person's number wherever it is needed: all would fill memory.
            own = torch.stack([_own(int(person), width) for person in who])
            whole = said / len(ATTRIBUTES) ** 0.5 + spectrum * (own + self._noise(rows, width))
            parts.append(F.normalize(whole + (0.5 * self._noise(rows, width) if asked else common), dim=1))
        return parts


def _own(person: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((person, width)).standard_normal(width, np.float32))


def measure(arm: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Seconds of one query ("one") and of BATCH queries ("many"), hits of these, and memory, of one arm."""
    queries: list[torch.Tensor] = torch.load(folder / "queries.pt", weights_only=True)
    scaled = torch.cat([(1 - OMEGA) * queries[0], OMEGA * queries[1]], dim=1)
    search: Callable[[int], Any]
    if arm.startswith("faiss"):
        import faiss  # noqa: F401  imported here, so that its memory does not count
    if arm.startswith("ceca"):
        import ceca.search.gallery  # noqa: F401
    before = peak_memory()
    words = torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="c")).view(torch.int64)
    if arm == "reading":
        one = min(fastest_each([words.sum, words.max]))
        return {"one": one, "reading": one}
    started = time.perf_counter()
    if arm.startswith("ceca"):
        approximate = settings.share if "approximate" in arm else 0.0
        search = ceca_search(folder, queries, RERANKED if "rerank" in arm else 0, approximate)
    elif arm == "NumPy":
        search = numpy_search(np.load(folder / "rows.npy", mmap_mode="r"), scaled.numpy())
    else:
        search = faiss_search(arm, np.load(folder / "rows.npy", mmap_mode="r"), scaled.numpy())
    figures: dict[str, Any] = {"opening": time.perf_counter() - started, "hits": search(BATCH)}
    figures |= {"many": fastest(lambda: search(BATCH)), "memory": peak_memory() - before}
    one, *reading = fastest_each([lambda: search(1), words.sum, words.max])
    return {**figures, "one": one, "reading": min(reading)}


def ceca_search(
    folder: Path, queries: list[torch.Tensor], rerank: int = 0, approximate: float = 0.0
) -> Callable[[int], Any]:
    from ceca.search.gallery import Gallery

    rows = torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="c"))
    numbers = np.arange(len(rows))
    shards = rows.split(2**18)
    gallery = Gallery(numbers.astype(np.uint64), numbers, shards, WIDTHS[0], approximate=approximate)

    def search(count: int) -> list[list[int]]:
        hits = gallery.search(queries[0][:count], queries[1][:count], omega=OMEGA, top_k=TOP_K, rerank_first=rerank)
        return [[hit.identity for hit in of_query] for of_query in hits]

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
        whole = faiss.IndexShards(rows.shape[1], True, True)  # threaded; row numbers go on from part to part
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
    run_benchmark(main, Settings, {arm: functools.partial(measure, arm) for arm in ARMS}, __doc__)
