"""The service under load, compared with its floor: the same model and gallery in one process, without a service.

    python benchmarks/serve.py --images 100000 --clients 1 4 8 16 32 --seconds 10

The benchmark publishes a gallery of random unit vectors and a model of random weights as a dataset; times do not depend
on their values. `python -m serve` serves it on this machine, and clients in a process of their own send requests over
HTTP. The same run takes the same texts through the same functions in this process, without Ray: one at a time (the
floor of latency) and in batches (the floor of throughput). The table has p50, p95 and p99 of latency and queries per
second, also as ratios to the floor. The last line says how long it takes until a search finds an added image.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import in_own_process, machine, run_benchmark
from ceca.config import ModelConfig
from ceca.data import schema
from ceca.data.store import Receipt, Store
from ceca.model.ceca import CECA
from ceca.model.embed import embed_texts
from ceca.model.weights import publish_model, serialize
from ceca.search.edition import find_edition
from ceca.search.searcher import Searcher
from cluster.object_store import free_port
from serve.client import Client

TINY = ModelConfig(backbone="ceca-tiny", image_height=128, image_width=64, mixer_heads=4, local_dim=256)
WORDS = (
    *("a", "woman", "man", "in", "red", "blue", "black", "white", "coat", "jacket"),
    *("jeans", "dress", "with", "backpack", "handbag", "hat", "short", "long", "hair"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of the gallery, of the load and of the service."""

    images: int = 100_000
    """Number of images in the gallery."""
    model: str = "ViT-B-16-quickgelu"
    """Backbone of the model; "tiny" is a small one."""
    clients: tuple[int, ...] = (1, 4, 8, 16, 32)
    """Numbers of clients; a row of the table each."""
    seconds: float = 10.0
    """Length of each measurement."""
    batch: int = 32
    """Most queries in one pass, of the service and of the floor."""
    adds: int = 20
    """Number of images added one after another."""
    options: tuple[str, ...] = ()
    """Further options of `python -m serve`."""


def publish(store: Store, config: ModelConfig, images: int, per_part: int = 16_384) -> None:
    """Publish a model of random weights, and the tables images, dialogues and gallery of `images` rows."""
    torch.manual_seed(0)
    model = CECA(config).eval()
    weights = serialize(model.state_dict())
    published = publish_model(
        store, "random", weights, model=config, config={}, training={}, made_from={}, version="random"
    )
    random = np.random.default_rng(0)
    pixel = b"\xff\xd8\xff\xd9"
    rows: dict[str, list[Receipt]] = {"images": [], "gallery": [], "dialogues": []}
    for part, start in enumerate(range(0, images, per_part)):
        count = min(per_part, images - start)
        ids = [schema.image_id(str(start + n)) for n in range(count)]
        known = {"image_id": ids, "identity": list(range(start, start + count)), "split": ["test"] * count}
        place = {"width": [1] * count, "height": [1] * count, "source_path": ids, "camera": [None] * count}
        told = {"image_id": ids, "summary": ["A person in a red coat and blue jeans."] * count, "turns": [[]] * count}
        told |= {"attributes": [{}] * count, "flags": [[]] * count, "model": ["none"] * count}
        told |= {"prompt_version": ["1"] * count, "generation_settings": ["{}"] * count}
        told |= dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), [0] * count)
        embedded = {}
        for name, width in (("global", published.global_dim), ("local", published.local_dim)):
            values = random.standard_normal((count, width), dtype=np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            embedded[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16).reshape(-1)), width)
        gallery = schema.gallery(published.global_dim, published.local_dim)
        columns = {**{k: pa.array(v) for k, v in known.items()}, **embedded}
        columns["model_digest"] = pa.array([published.digest] * count)
        tables = {
            "images": pa.Table.from_pydict({**known, **place, "image": [pixel] * count}, schema.IMAGES),
            "gallery": pa.table([columns[field.name].cast(field.type) for field in gallery], schema=gallery),
            "dialogues": pa.Table.from_pydict(told, schema.DIALOGUES),
        }
        for name, table in tables.items():
            rows[name].append(Receipt({name: store.write_part(name, "1", part, table)}))
    made = {"images": "1", "dialogues": "1", "model": published.digest}
    for stage, name in (("ingest", "images"), ("dialogue", "dialogues"), ("index", "gallery")):
        made_from = {} if name == "images" else made if name == "gallery" else {"images": "1"}
        store.publish(stage, "1", (name,), rows[name], made_from=made_from, config={}, notes={"model": "random"})


def texts(count: int) -> list[str]:
    """Different queries of 12 to 30 words."""
    random = np.random.default_rng(1)
    return [" ".join(random.choice(WORDS, size=int(random.integers(12, 31)))) for _ in range(count)]


def floor(store: Store, batch: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each query alone, and queries per second in batches, in this process with all cores."""
    searcher = Searcher(store)
    queries = texts(4096)

    def run(some: list[str]) -> None:
        pair = embed_texts(searcher.model, some)
        searcher.gallery.search(*pair, omega=0.3, top_k=10)

    for size in (1, batch):
        run(queries[:size])
    alone: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        run([queries[len(alone) % len(queries)]])
        alone.append(time.perf_counter() - started)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        run([queries[(done + n) % len(queries)] for n in range(batch)])
        done += batch
    return alone, done / (time.perf_counter() - begun)


@contextlib.contextmanager
def served(data: str, port: int, options: list[str]) -> Iterator[None]:
    """Run `python -m serve` while the context lasts; it is ready when the context begins."""
    command = [sys.executable, "-m", "serve", "--data", data, "--port", str(port), *options]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        begun = time.monotonic()
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - begun > 300:
                raise SystemExit("the service does not start")
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


async def load(url: str, clients: int, seconds: float) -> dict[str, list[float]]:
    """Send requests from several clients; each sends the next one as soon as the last one is answered.

    Args:
        url: of the search route.
        clients: number of clients.
        seconds: length of the measurement, after at most 3 s that warm the service up.

    Returns:
        HTTP status -> seconds of each answer with this status.
    """
    latencies: dict[str, list[float]] = {}
    queries = itertools.cycle(texts(4096))

    async def client(connection: httpx.AsyncClient, end: float) -> None:
        while time.perf_counter() < end:
            started = time.perf_counter()
            answer = await connection.post(url, json={"query": next(queries)})
            latencies.setdefault(str(answer.status_code), []).append(time.perf_counter() - started)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=60, limits=limits) as connection:
        for length, kept in ((min(3.0, seconds), False), (seconds, True)):
            end = time.perf_counter() + length
            await asyncio.gather(*(client(connection, end) for _ in range(clients)))
            if not kept:
                latencies.clear()
    return latencies


def measure_adding(url: str, count: int) -> list[float]:
    """Seconds from sending an image with its description until a search can find it, for each of `count` images."""
    random, took = np.random.default_rng(2), []
    with Client(url) as client:
        for _ in range(count):
            content = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (128, 64, 3), dtype=np.uint8)).save(content, "PNG")
            started = time.perf_counter()
            client.add(content.getvalue(), summary="A person in a red coat and blue jeans.")
            took.append(time.perf_counter() - started)
    return took


def measure_load(settings: Settings, folder: Path) -> dict[str, list[float]]:
    """`load` of the only number in `settings.clients`, from this process; the service's URL is in the folder."""
    (clients,) = settings.clients
    url = (folder / "url").read_text()
    return asyncio.run(load(f"{url}/v1/search", clients, settings.seconds))


def main(settings: Settings) -> None:
    config = TINY if settings.model == "tiny" else ModelConfig(backbone=settings.model)
    with tempfile.TemporaryDirectory(prefix="ceca-benchmark-") as folder, tempfile.TemporaryDirectory() as data:
        store = Store(data)
        publish(store, config, settings.images)
        width = find_edition(store).global_dim + config.local_dim
        print(f"{settings.images:,} images x {width}, {settings.model}, batch {settings.batch}, {machine()}")
        torch.set_num_threads(os.cpu_count() or 1)
        alone, throughput = floor(store, settings.batch, settings.seconds)
        latency = float(np.median(alone))
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        (Path(folder) / "url").write_text(url)
        with served(data, port, ["--batch", str(settings.batch), *settings.options]):
            print(f"\n{'clients':8}{'p50':>10}{'of floor':>10}{'p95':>10}{'p99':>10}{'queries/s':>11}{'of floor':>10}")
            print(f"{'floor':8}{1e3 * latency:7.1f} ms{'':30}{throughput:11.1f}", flush=True)
            for clients in settings.clients:
                one_size = dataclasses.replace(settings, clients=(clients,))
                answers = in_own_process(__file__, "load", one_size, Path(folder))
                print(row(clients, answers, settings.seconds, latency, throughput), flush=True)
            took = np.array(measure_adding(url, settings.adds))
    print(f"{settings.adds} images added one by one: found after {took.mean():.2f} s, at most {took.max():.2f} s")


def row(clients: int, answers: dict[str, list[float]], seconds: float, latency: float, throughput: float) -> str:
    """One row of the table.

    Args:
        clients: number of clients.
        answers: HTTP status -> seconds of each answer; statuses other than 200 are counted at the end of the row.
        seconds: length of the measurement.
        latency: floor, in seconds.
        throughput: floor, in queries per second.
    """
    took = np.array(answers.get("200", [np.nan]))
    p50, p95, p99 = (1e3 * float(np.percentile(took, percent)) for percent in (50, 95, 99))
    rate = len(took) / seconds
    refused = {status: len(values) for status, values in answers.items() if status != "200"}
    return (
        f"{clients:<8}{p50:7.1f} ms{p50 / 1e3 / latency:9.2f}x{p95:7.1f} ms{p99:7.1f} ms{rate:11.1f}"
        f"{rate / throughput:10.0%} {refused or ''}"
    )


if __name__ == "__main__":
    run_benchmark(main, Settings, {"load": measure_load}, __doc__)
