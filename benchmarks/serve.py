"""The service under load, against the floor: what its model and gallery take in one process, without a service.

    python benchmarks/serve.py --images 100000 --clients 1 4 8 16 32 --seconds 10

A gallery of random unit vectors and a model of random weights (time does not depend on what they are) are published as
a dataset and served by `python -m serve` on this machine; clients in a process of their own ask over HTTP. In the same
run this process takes the same texts through the same functions without Ray: alone (the floor of latency) and in
batches (the floor of throughput). Reports p50, p95 and p99 of latency and queries per second, each as a ratio, and how
long an added image takes to be found.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import pyarrow as pa
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

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

TINY = {"backbone": "ceca-tiny", "image_height": 128, "image_width": 64, "mixer_heads": 4, "local_dim": 256}
WORDS = (
    *("a", "woman", "man", "in", "red", "blue", "black", "white", "coat", "jacket"),
    *("jeans", "dress", "with", "backpack", "handbag", "hat", "short", "long", "hair"),
)


def publish(store: Store, config: ModelConfig, images: int, per_part: int = 16_384) -> None:
    """A model of random weights, and a gallery, an images table and dialogues of as many rows as asked for."""
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
    """Seconds of each query alone, and queries per second in batches, in this process with all its threads."""
    searcher = Searcher(store)
    asked = texts(4096)

    def run(some: list[str]) -> None:
        pair = embed_texts(searcher.model, some)
        searcher.gallery.search(*pair, omega=0.3, top_k=10)

    for size in (1, batch):
        run(asked[:size])
    alone: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        run([asked[len(alone) % len(asked)]])
        alone.append(time.perf_counter() - started)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        run([asked[(done + n) % len(asked)] for n in range(batch)])
        done += batch
    return alone, done / (time.perf_counter() - begun)


@contextlib.contextmanager
def served(data: str, port: int, options: list[str]) -> Iterator[None]:
    """`python -m serve` until the end."""
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
    """Clients that each ask again as soon as they are answered: seconds of each answer, by HTTP status."""
    asked, latencies = texts(4096), {}
    place = 0

    async def client(number: int, connection: httpx.AsyncClient, end: float) -> None:
        nonlocal place
        while time.perf_counter() < end:
            place += 1
            started = time.perf_counter()
            answer = await connection.post(url, json={"query": asked[place % len(asked)]})
            latencies.setdefault(str(answer.status_code), []).append(time.perf_counter() - started)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=60, limits=limits) as connection:
        for length, kept in ((min(3.0, seconds), False), (seconds, True)):  # the first seconds warm it up
            end = time.perf_counter() + length
            await asyncio.gather(*(client(number, connection, end) for number in range(clients)))
            if not kept:
                latencies.clear()
    return latencies


def added(url: str, count: int) -> list[float]:
    """Seconds from sending an image, with its description, until a search can find it."""
    random, took = np.random.default_rng(2), []
    with Client(url) as client:
        for _ in range(count):
            content = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (128, 64, 3), dtype=np.uint8)).save(content, "PNG")
            started = time.perf_counter()
            client.add(content.getvalue(), summary="A person in a red coat and blue jeans.")
            took.append(time.perf_counter() - started)
    return took


def main(
    images: Annotated[int, tyro.conf.arg(help="in the gallery")] = 100_000,
    model: Annotated[str, tyro.conf.arg(help="ViT-B-16-quickgelu, or tiny")] = "ViT-B-16-quickgelu",
    clients: tuple[int, ...] = (1, 4, 8, 16, 32),
    seconds: Annotated[float, tyro.conf.arg(help="of each measurement")] = 10.0,
    batch: int = 32,
    adds: Annotated[int, tyro.conf.arg(help="images that are added one after another")] = 20,
    options: Annotated[tuple[str, ...], tyro.conf.arg(help="of `python -m serve`")] = (),
    asking: Annotated[str, tyro.conf.arg(help="URL: only ask, for the process of the clients")] = "",
) -> None:
    if asking:
        (count,) = clients
        print(json.dumps(asyncio.run(load(asking, count, seconds))))
        return
    config = ModelConfig(**TINY) if model == "tiny" else ModelConfig(backbone=model)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        publish(store, dataclasses.replace(config), images)
        print(f"{images:,} images x {find_edition(store).global_dim + config.local_dim}, {model}, batch {batch}")
        torch.set_num_threads(os.cpu_count() or 1)
        alone, throughput = floor(store, batch, seconds)
        base = float(np.median(alone))
        print(f"floor: p50 {1e3 * base:.1f} ms alone, {throughput:.1f} queries/s in batches")
        port = free_port()
        with served(folder, port, ["--batch", str(batch), *options]):
            for count in clients:
                command = [sys.executable, __file__, "--clients", str(count), "--seconds", str(seconds)]
                command += ["--asking", f"http://127.0.0.1:{port}/v1/search"]
                found = json.loads(subprocess.check_output(command, text=True))
                took = np.array(found.get("200", [np.nan]))
                p50, p95, p99 = (1e3 * float(np.percentile(took, q)) for q in (50, 95, 99))
                rate = len(took) / seconds
                other = {status: len(values) for status, values in found.items() if status != "200"}
                over = f"{p50 / 1e3 / base:.2f} x floor, {p50 - 1e3 * base:+.1f} ms"
                print(
                    f"{count:3d} clients: p50 {p50:.1f} ms ({over}), p95 {p95:.1f}, "
                    f"p99 {p99:.1f}; {rate:.1f}/s ({rate / throughput:.0%} of the floor) {other or ''}",
                    flush=True,
                )
            took = np.array(added(f"http://127.0.0.1:{port}", adds))
            print(f"{adds} images added one after another: found after {took.mean():.2f} s, at most {took.max():.2f} s")


if __name__ == "__main__":
    tyro.cli(main)
