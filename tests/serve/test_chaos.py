"""Sixteen clients ask while replicas die or hang, galleries and models change, and the service grows and shrinks."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import ray
from ray import serve as ray_serve

from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.search.edition import find_edition
from ceca.search.searcher import Searcher
from serve.app import QUIET, application
from serve.proxy import LATE_S
from serve.wire import INGRESS
from tests.conftest import own_processes
from tests.serve.conftest import COUNT, Running, wait_until_ready
from tests.serve.dataset import QUERY, publish_gallery, publish_people, publish_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLIENTS = 16
NAME = "chaos"


class Clients:
    """Clients on one event loop, each asking again soon after it is answered: replicas that start need a core too."""

    def __init__(self, url: str, pause_s: float = 0.2, count: int = CLIENTS):
        self.url, self.pause_s, self.count, self.going = url, pause_s, count, True
        self.answers: list[httpx.Response] = []
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=lambda: asyncio.run(self._ask_all()))
        self.thread.start()

    async def _ask_all(self) -> None:
        limits = httpx.Limits(max_connections=self.count, max_keepalive_connections=self.count)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            await asyncio.gather(*(self._ask(client) for _ in range(self.count)))

    async def _ask(self, client: httpx.AsyncClient) -> None:
        while self.going:
            try:
                answer = await client.post(self.url, json={"query": QUERY, "top_k": 30})
                self.answers.append(answer)
                await asyncio.sleep(float(answer.headers.get("retry-after", self.pause_s)))
            except Exception as error:
                self.errors.append(error)

    def stop(self) -> None:
        self.going = False
        self.thread.join(120)


@dataclasses.dataclass
class Chaos:
    store: Store
    config: ServeConfig
    client: httpx.Client
    clients: Clients
    expected: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)

    def remember(self) -> tuple[str, str]:
        """What a search in one process answers now."""
        searcher = Searcher(self.store)
        name = searcher.edition.model_name, searcher.edition.gallery_name
        self.expected[name] = [hit.similarity for hit in searcher.search(QUERY, omega=0.3, top_k=30)]
        return name

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def answered(self, since: int = 0) -> set[tuple[str, str]]:
        found = [answer.json() for answer in self.clients.answers[since:] if answer.status_code == 200]
        return {(answer["model"], answer["gallery"]) for answer in found}

    def kill_one(self, deployment: str) -> None:
        found = [
            actor
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if f"{NAME}#{deployment}#" in actor["name"]
        ]
        assert found, deployment
        ray.kill(ray.get_actor(found[0]["name"], namespace=found[0]["namespace"]), no_restart=True)

    def let_one_hang(self, deployment: str) -> None:
        """A process stops for as long as it takes to give up its requests, and to answer others meanwhile."""
        process = own_processes(f"ServeReplica:{NAME}:{deployment}")[0]
        before, end = len(self.clients.answers), time.monotonic() + self.config.timeout_s + 2 * LATE_S
        process.suspend()
        try:
            self.until(lambda: time.monotonic() > end and len(self.clients.answers) > before + 50)
        finally:
            process.resume()

    def replicas(self, deployment: str) -> int:
        status: Any = ray_serve.status().applications[NAME].deployments[deployment]
        return sum(count for state, count in status.replica_states.items() if state == "RUNNING")


@pytest.fixture
def chaos(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    store = Store(str(tmp_path_factory.mktemp("chaos")))
    publish_people(store, COUNT)
    model, published = publish_tiny(store, "tiny", seed=1)
    publish_gallery(store, model, published, "tiny")
    config = ServeConfig(ingress_replicas=2, encoder_replicas=2, search_replicas=2, follow_s=0.5)
    deploy(store, config)
    with httpx.Client(base_url=f"{running.url}/{NAME}", timeout=60) as client:
        wait_until_ready(client)
        clients = Clients(f"{running.url}/{NAME}/v1/search")
        try:
            yield Chaos(store, config, client, clients)
        finally:
            clients.stop()
            ray_serve.delete(NAME)


def deploy(store: Store, config: ServeConfig) -> None:
    app = application(find_edition(store), config)
    ray_serve.run(app, name=NAME, route_prefix=f"/{NAME}", logging_config=QUIET)


def assert_none_lost(chaos: Chaos, names: list[tuple[str, str]], unavailable: float = 0.01) -> None:
    """Every question was answered, by one of these models with its gallery, as one process answers.

    At most this share of them was answered with "try again".
    """
    chaos.clients.stop()
    assert not chaos.clients.errors
    statuses = Counter(answer.status_code for answer in chaos.clients.answers)
    print(f"{len(chaos.clients.answers)} questions: {dict(statuses)}")
    assert set(statuses) <= {200, 503}, next(a.text for a in chaos.clients.answers if a.status_code not in (200, 503))
    assert statuses[503] <= unavailable * statuses[200]
    assert chaos.answered() == set(names)
    for answer in chaos.clients.answers:
        if answer.status_code == 200:
            body = answer.json()
            similarity = [hit["similarity"] for hit in body["hits"]]
            assert similarity == pytest.approx(chaos.expected[body["model"], body["gallery"]], abs=1e-5)


def test_no_question_is_lost_and_no_answer_mixes_versions(chaos: Chaos) -> None:
    names = [chaos.remember()]
    chaos.until(lambda: len(chaos.clients.answers) > 50)
    for deployment, count in ((INGRESS, 2), ("QueryEncoder", 2), ("GallerySearch0", 2), ("Intake", 1)):
        chaos.kill_one(deployment)
        before = len(chaos.clients.answers)
        chaos.until(lambda before=before: len(chaos.clients.answers) > before + 50)  # type: ignore[misc]
        chaos.until(lambda d=deployment, n=count: chaos.replicas(d) == n)  # type: ignore[misc]

    model, published = publish_tiny(chaos.store, "tiny", seed=1)
    publish_gallery(chaos.store, model, published, "tiny", number=2, leave_out=4)
    names.append(chaos.remember())
    chaos.until(lambda: names[-1] in chaos.answered())
    model, published = publish_tiny(chaos.store, "second", seed=2)
    publish_gallery(chaos.store, model, published, "second", number=3)
    names.append(chaos.remember())
    chaos.until(lambda: names[-1] in chaos.answered())

    assert_none_lost(chaos, names)


@pytest.mark.long
def test_questions_at_a_process_that_hangs_are_answered_by_another(chaos: Chaos) -> None:
    """Encoder and shards wait for it too, so that for seconds the other ingress replica asks some to try again."""
    deploy(chaos.store, dataclasses.replace(chaos.config, timeout_s=5.0))
    chaos.until(lambda: chaos.replicas(INGRESS) == 2)
    name = chaos.remember()
    chaos.config = dataclasses.replace(chaos.config, timeout_s=5.0)
    for _ in range(2):
        chaos.let_one_hang(INGRESS)
    assert_none_lost(chaos, [name], unavailable=0.1)
    assert max(answer.elapsed.total_seconds() for answer in chaos.clients.answers) < 30


@pytest.mark.long
def test_a_deployment_grows_and_shrinks_while_it_is_asked(chaos: Chaos) -> None:
    name = chaos.remember()
    for replicas in (3, 1):
        deploy(chaos.store, dataclasses.replace(chaos.config, encoder_replicas=replicas, search_replicas=replicas))
        chaos.until(lambda n=replicas: chaos.replicas("QueryEncoder") == n)  # type: ignore[misc]
        before = len(chaos.clients.answers)
        chaos.until(lambda before=before: len(chaos.clients.answers) > before + 50)  # type: ignore[misc]
    assert_none_lost(chaos, [name])


@pytest.mark.long
def test_replicas_come_with_the_load_and_go_after_it(chaos: Chaos) -> None:
    """Half of a queue of sixteen is what one ingress replica should have, and sixteen clients ask."""
    chaos.clients.stop()
    grown = {"ingress_replicas": 1, "ingress_replicas_max": 2, "queue": CLIENTS, "shrink_s": 2}
    deploy(chaos.store, dataclasses.replace(chaos.config, **grown))  # type: ignore[arg-type]
    chaos.until(lambda: chaos.replicas(INGRESS) == 1)
    crowd = Clients(chaos.clients.url, pause_s=0)
    try:
        chaos.until(lambda: chaos.replicas(INGRESS) == 2)
    finally:
        crowd.stop()
    chaos.until(lambda: chaos.replicas(INGRESS) == 1)
    assert not crowd.errors
    assert {answer.status_code for answer in crowd.answers} == {200}


@pytest.mark.long
def test_who_asks_too_much_is_told_when_to_come_again(chaos: Chaos) -> None:
    """Declared overload: a queue of four, and sixteen clients."""
    chaos.clients.stop()
    deploy(chaos.store, dataclasses.replace(chaos.config, ingress_replicas=1, queue=4, encoder_replicas=1))
    crowd = Clients(chaos.clients.url, pause_s=0)
    try:
        chaos.until(lambda: any(answer.status_code == 503 for answer in crowd.answers))
        chaos.until(lambda: len(crowd.answers) > 100)
    finally:
        crowd.stop()
    assert not crowd.errors
    assert {answer.status_code for answer in crowd.answers} == {200, 503}
    assert all(a.headers["retry-after"] == "1" for a in crowd.answers if a.status_code == 503)
