"""A real Ray Serve over the small dataset, shared by the tests of the service."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from fastapi import Request
from ray import serve as ray_serve

from ceca.config import DialogueConfig, OpenAIConfig, ServeConfig
from ceca.data.store import Store
from ceca.search.edition import find_edition
from ceca.search.searcher import Searcher
from ceca.settings import to_mapping
from cluster.object_store import free_port
from serve.app import QUIET, application
from serve.environment import ENVIRONMENT
from tests.endpoint import ChatServer, completion
from tests.serve.collector import Collector
from tests.serve.dataset import publish_gallery, publish_people, publish_tiny

ROOT = Path(__file__).parents[2]
TEXT_LIMIT, TOP_K_LIMIT = 300, 12
COUNT = 17


@dataclass
class Running:
    """A dataset, the service over it, a client of the service, and the same search without a cluster."""

    store: Store
    url: str
    client: httpx.Client
    searcher: Searcher
    keys: dict[str, str]  # of a second application below /closed, which needs them and whose gallery tests change
    audit: Path  # folder of that application's log
    describer: Describer
    collector: Collector

    def search(self, **body: object) -> dict:
        response = self.client.post("/v1/search", json=body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="package")
def people(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("people")))
    publish_people(store, COUNT)
    model, published = publish_tiny(store, "tiny", seed=1)
    publish_gallery(store, model, published, "tiny")
    return store


def wait_until_ready(client: httpx.Client, prefix: str = "") -> dict:
    """What is served, when all replicas have loaded it."""
    deadline = time.monotonic() + 60
    while (answer := client.get(f"{prefix}/readyz")).status_code != 200:
        assert answer.headers["retry-after"] == "1"
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    return answer.json()


class Describer:
    """A chat server's answers: about the shoes, and a summary; slow or broken on demand."""

    def __init__(self) -> None:
        self.seconds, self.broken, self.asked = 0.0, False, 0

    async def __call__(self, body: dict[str, Any], request: Request) -> Any:
        self.asked += 1
        await asyncio.sleep(self.seconds)
        if self.broken:
            return completion("")
        turn = sum(message["role"] == "user" for message in body["messages"])
        return completion(f"Answer {turn}: a person in a turquoise shirt.", prompt_tokens=1, completion_tokens=1)


@dataclass
class Changing:
    store: Store
    client: httpx.Client
    describer: Describer

    def search(self, **body: object) -> dict:
        response = self.client.post("/v1/search", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def add(self, content: bytes, **about: object) -> str:
        answer = self.client.post("/v1/images", params=about, content=content, headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == 202, answer.text
        return answer.json()["job"]

    def finished(self, job: str, seconds: float = 30) -> dict:
        deadline = time.monotonic() + seconds
        while True:
            answer = self.client.get(f"/v1/jobs/{job}")
            if answer.status_code != 503 and answer.json()["status"] != "waiting":  # 503 while the intake starts again
                return answer.json()
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.1)

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)


KEYS = {"portal": ["search"], "loader": ["write"], "slow": ["search"], "both": ["search", "write", "admin"]}
PER_MINUTE = {"slow": 2, "both": 100_000}


@pytest.fixture(scope="package")
def running(people: Store, changing_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = {name: f"{name}-secret-of-the-test" for name in KEYS}
    entries = [
        {"name": name, "sha256": hashlib.sha256(keys[name].encode()).hexdigest(), "scopes": scopes}
        | {"per_minute": PER_MINUTE.get(name, 600)}
        for name, scopes in KEYS.items()
    ]
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": entries}))
    audit = file.parent / "audit"
    port, describer = free_port(), Describer()
    server = ChatServer(describer)
    collector = Collector()
    os.environ.update(ENVIRONMENT)
    os.environ.update(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="200",  # ms
        RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH="serve.tracing:exporters",
        RAY_SERVE_TRACING_SAMPLING_RATIO="0",  # only requests that come with a trace
    )
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET)
        config = ServeConfig(top_k_limit=TOP_K_LIMIT, text_limit=TEXT_LIMIT, shards=2)
        targets = [
            ray_serve.RunTarget(application(find_edition(people), config), route_prefix="/", logging_config=QUIET),
            ray_serve.RunTarget(
                application(
                    find_edition(changing_store),
                    ServeConfig(keys=str(file), audit=str(audit), follow_s=0.3, engine_url=server.url),
                ),
                name="closed",
                route_prefix="/closed",
                logging_config=QUIET,
            ),
        ]
        ray_serve.run_many(targets)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until_ready(client)
            wait_until_ready(client, "/closed")
            url = f"http://127.0.0.1:{port}"
            yield Running(people, url, client, Searcher(people), keys, audit, describer, collector)
    finally:
        ray_serve.shutdown()
        ray.shutdown()
        server.close()
        collector.close()


@pytest.fixture(scope="package")
def changing_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A dataset that tests change, whose dialogues came from a chat server."""
    store = Store(str(tmp_path_factory.mktemp("changing")))
    asked = DialogueConfig(engine="openai", openai=OpenAIConfig(base_url="http://nowhere.invalid/v1", model="chat"))
    publish_people(store, COUNT, to_mapping(asked, results_only=True))
    model, published = publish_tiny(store, "tiny", seed=1)
    publish_gallery(store, model, published, "tiny")
    return store


@pytest.fixture
def changing(running: Running, changing_store: Store) -> Iterator[Changing]:
    """The application over it."""
    headers = {"Authorization": f"Bearer {running.keys['both']}"}
    with httpx.Client(base_url=f"{running.url}/closed", timeout=30, headers=headers) as client:
        yield Changing(changing_store, client, running.describer)
