"""Re-ranking by an engine while somebody waits: its verdicts in time, or the plain order; the answer says which."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray
import uvicorn
from playwright.sync_api import Browser, expect
from ray import serve as ray_serve
from ray.util import list_named_actors
from starlette.testclient import TestClient

from ceca.config import EvaluateConfig, OpenAIConfig, ServeConfig
from ceca.data import schema
from ceca.data.store import Store
from ceca.dialogue.verdicts import learned_weights
from ceca.search.edition import find_edition
from ceca.settings import ConfigError, to_mapping
from cluster.object_store import free_port
from serve.access import Gate
from serve.api import make_api
from serve.app import QUIET, application
from serve.client import Client, Rerank
from serve.judge import VERDICT_BYTES
from tests.conftest import own_processes
from tests.endpoint import ChatServer
from tests.serve.conftest import COUNT, Running, wait_until_ready
from tests.serve.dataset import publish_gallery, publish_people, publish_tiny
from tests.serve.inside import InProcess, InThisProcess, WithEngine
from tests.serve.looks import OMEGA, Looks, publish_weight, wears

HERE = "http://localhost:8000"
BUSY = 5.0  # seconds by which a busy machine may be late; the engine would take at least 30
# Two of the sixteen people wear both: 1 and 9. With a weight of 1, claims count before similarities.
QUERY = "a person in a green shirt and purple trousers"
CLAIMS = {"upper_kind": "shirt", "upper_colour": "green", "lower_kind": "trousers", "lower_colour": "purple"}
PEOPLE = {schema.image_id(f"{number:04d}.jpg"): number for number in range(COUNT)}


class Asked:
    """A service that somebody asks, and what its engine sees."""

    def __init__(self, client: TestClient, service: WithEngine, looks: Looks):
        self.client, self.service, self.looks = client, service, looks

    def search(self, query: str = QUERY, seconds: float = 25.0, **body: Any) -> dict[str, Any]:
        rerank = {"seconds": seconds, **body.pop("rerank", {})}
        answer = self.client.post("/v1/search", json={"query": query, "top_k": 16, "rerank": rerank, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def plain(self, query: str = QUERY, **body: Any) -> list[int]:
        answer = self.client.post("/v1/search", json={"query": query, "top_k": 16, **body}).json()
        assert answer["reranking"] is None
        return people(answer)


def until(search: Callable[[], dict[str, Any]], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Search until an answer's re-ranking fits."""
    deadline = time.monotonic() + 30
    while not fits((answer := search())["reranking"]):
        assert time.monotonic() < deadline, answer["reranking"]
        time.sleep(0.02)
    return answer


def people(answer: dict[str, Any]) -> list[int]:
    return [PEOPLE[hit["image_id"]] for hit in answer["hits"]]


def settings(endpoint: ChatServer, **changed: Any) -> ServeConfig:
    asked = OpenAIConfig(base_url=endpoint.url, model="chat", retries=0)
    return ServeConfig(
        rerank_engine="openai", **{"openai": asked, "timeout_s": 60, "rerank_seconds_limit": 25, **changed}
    )


@pytest.fixture(scope="module")
def endpoint() -> Iterator[ChatServer]:
    server = ChatServer(Looks(COUNT))
    yield server
    server.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, endpoint: ChatServer) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("reranked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CECA_CACHE", str(folder / "cache"))
        store = Store(str(folder / "data"))
        publish_people(store, COUNT)
        model, published = publish_tiny(store, "tiny", seed=0)
        publish_gallery(store, model, published, "tiny")
        publish_weight(store, published.digest, settings(endpoint).openai, 1.0)
        yield store


@pytest.fixture(scope="module")
def service(store: Store, endpoint: ChatServer) -> Iterator[tuple[WithEngine, TestClient]]:
    config = settings(endpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.judge.OnDemand", InThisProcess)
        patch.setattr("serve.engine.RETRY_S", 0.0)
        service = WithEngine(store, config)
        with TestClient(make_api(service, config, Gate(())), HERE) as client:
            first = Asked(client, service, endpoint.reply).search()  # type: ignore[arg-type]
            assert first["reranking"]["by"] == "plain"  # nobody has needed the engine before
            assert first["reranking"]["reason"].endswith("the engine that looks at hits is starting")
            yield service, client


@pytest.fixture
def asked(service: tuple[WithEngine, TestClient], endpoint: ChatServer) -> Asked:
    """The service, which knows no verdict yet."""
    endpoint.reply = looks = Looks(COUNT)
    service[0].reranker.judge.judge.versions = None  # type: ignore[union-attr]
    return Asked(service[1], service[0], looks)


# --- by the engine ----------------------------------------------------------------------------------------


def test_verdicts_rank_the_best_images_and_are_told(asked: Asked):
    before = asked.plain()
    answer = asked.search(rerank={"images": 12})
    after, how = people(answer), answer["reranking"]
    assert (how["by"], how["reason"], how["weight"], how["claims"]) == ("engine", "", 1.0, CLAIMS)
    assert (how["questions"], how["known"], how["answered"]) == (48, 0, 48)
    assert 0 < how["seconds"] < 25

    def fitting(number: int) -> int:
        return sum(wears(number)[name] == value for name, value in CLAIMS.items())

    # Those that were looked at, by what fits, then by similarity; behind them the others as they were.
    assert after[:12] == sorted(before[:12], key=lambda number: (-fitting(number), before.index(number)))
    assert after[:12] != before[:12]
    assert after[12:] == before[12:]
    for hit, number in zip(answer["hits"][:12], after, strict=False):
        said = {name: "fits" if wears(number)[name] == value else "differs" for name, value in CLAIMS.items()}
        assert hit["verdicts"] == said
    assert {hit["verdicts"] is None for hit in answer["hits"][12:]} == {True}
    pages = [asked.search(rerank={"images": 12}, top_k=8, offset=offset) for offset in (0, 8)]
    assert people(pages[0]) + people(pages[1]) == after


def test_what_is_known_costs_nothing(asked: Asked):
    asked.search()
    assert set(asked.looks.asked.values()) == {1}
    questions = asked.looks.asked.total()
    assert questions == 10 * 4
    again = asked.search()["reranking"]
    assert (again["by"], again["known"], again["answered"]) == ("engine", 40, 40)
    assert asked.looks.asked.total() == questions
    other = asked.search("a person in a green shirt", rerank={"images": 16})["reranking"]
    assert other["claims"] == {"upper_kind": "shirt", "upper_colour": "green"}
    assert other["known"] >= 2 * (10 - 6)  # of sixteen images, at least four are among the ten
    assert asked.looks.asked.total() == questions + 32 - other["known"]
    assert set(asked.looks.asked.values()) == {1}


def test_searches_of_the_same_moment_ask_each_question_once(asked: Asked):
    asked.looks.seconds = 0.02
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: asked.search(), range(8)))
    assert {answer["reranking"]["answered"] for answer in answers} == {40}
    assert set(asked.looks.asked.values()) == {1}
    assert len({tuple(people(answer)) for answer in answers}) == 1


def test_what_was_not_answered_in_time_counts_as_unseen(asked: Asked):
    before = asked.plain()
    asked.looks.silent = {1, 9}  # the two that fit
    late = [number for number in before[:10] if number in asked.looks.silent]
    assert late
    answer = until(lambda: asked.search(seconds=0.6), lambda how: how["answered"] == 40 - 4 * len(late))
    after, how = people(answer), answer["reranking"]
    assert how["by"] == "engine"
    assert how["reason"] == f"{4 * len(late)} of 40 questions have no verdict within 0.6 s"
    assert 0.5 < how["seconds"] < 0.6 + BUSY
    fitting = {number: sum(wears(number)[name] == value for name, value in CLAIMS.items()) for number in before}
    supported = {number: 0 if number in late else 2 * fitting[number] - 4 for number in before}
    assert after[:10] == sorted(before[:10], key=lambda number: (-supported[number], before.index(number)))
    asked.looks.silent = set()
    assert asked.search()["reranking"]["answered"] == 40  # a silent engine keeps nobody waiting later


def test_only_searches_whose_first_two_are_close_are_asked_about(asked: Asked):
    first, second = (hit["similarity"] for hit in asked.search(rerank={"margin": 1e-9})["hits"][:2])
    assert first > second
    assert asked.search(rerank={"margin": 1e-9})["reranking"]["reason"].endswith("not as close as margin")
    assert not asked.looks.asked
    assert asked.search(rerank={"margin": first - second + 1e-6})["reranking"]["by"] == "engine"


def test_the_memory_of_verdicts_is_bounded_and_knows_no_erased_image(asked: Asked, monkeypatch: pytest.MonkeyPatch):
    asked.search()
    judge = asked.service.reranker.judge.judge
    versions, image_id = judge.versions, next(iter(PEOPLE))
    assert len(judge.kept.values) == 40
    monkeypatch.setattr("serve.judge.KEPT_BYTES", 10 * VERDICT_BYTES)
    judge.versions = None
    assert asked.search()["reranking"]["answered"] == 40
    assert len(judge.kept.values) == 10
    removed = (versions[0], ("removal.json",))
    assert asyncio.run(judge.known(removed, [image_id], [])) == {image_id: {}}
    assert len(judge.kept.values) == 0


# --- without it -------------------------------------------------------------------------------------------


def test_a_slow_engine_leaves_the_plain_order_and_costs_no_more_than_was_asked(asked: Asked):
    before = asked.plain()
    asked.looks.seconds = 30.0
    answer = asked.search(seconds=0.4)
    assert 0.3 < answer["reranking"]["seconds"] < 0.4 + BUSY
    assert people(answer) == before
    assert answer["reranking"]["by"] == "plain"
    assert answer["reranking"]["reason"] == "40 of 40 questions have no verdict within 0.4 s"
    assert {hit["verdicts"] for hit in answer["hits"]} == {None}


def test_an_engine_that_goes_away_and_comes_back(asked: Asked):
    before = asked.plain()
    asked.search(rerank={"images": 4})
    asked.looks.away = True
    away = asked.search(query="a person in boots")
    assert away["reranking"]["seconds"] < BUSY  # nobody waits for an engine that says that it is away
    assert people(away) == asked.plain("a person in boots")
    assert (away["reranking"]["by"], away["reranking"]["answered"]) == ("plain", 0)
    assert "10 of 10 questions have no verdict within 25 s" in away["reranking"]["reason"]
    assert "HTTP 503: no backend" in away["reranking"]["reason"]
    assert "HTTP 503" in asked.client.get("/v1/status").json()["reranking"]
    partly = asked.search()
    assert partly["reranking"]["by"] == "engine"  # by what is known of four images
    assert "24 of 40 questions have no verdict within 25 s: " in partly["reranking"]["reason"]
    assert people(partly)[10:] == before[10:]
    asked.looks.away = False
    again = until(asked.search, lambda how: how["answered"] == 40)["reranking"]
    assert (again["by"], again["reason"]) == ("engine", "")
    assert asked.client.get("/v1/status").json()["reranking"] == ""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"query": "somebody"}, "the description states no attribute"),
        ({"omega": 0.5}, "no weight of the engine's verdicts was learned for the model tiny@"),
        ({"suggest": True}, "a conversation ranks by its answers"),
        ({"where": {"upper_colour": ["green"], "camera": ["c1"]}}, "fewer than two images"),
    ],
)
def test_a_search_that_the_engine_cannot_help_says_why(asked: Asked, body: dict[str, Any], says: str):
    answer = asked.search(**body)
    assert answer["reranking"]["by"] == "plain"
    assert says in answer["reranking"]["reason"]
    assert people(answer) == asked.plain(**body)
    assert not asked.looks.asked


def test_verdicts_that_raised_nothing_weigh_nothing(store: Store, asked: Asked):
    digest, reranker = find_edition(store).digest, asked.service.reranker
    before, reranker.weights = reranker.weights, (digest, {OMEGA: 0.0})
    try:
        answer = asked.search()
    finally:
        reranker.weights = before
    assert answer["reranking"]["reason"].startswith("the engine's verdicts raised no figure on the validation split")
    assert people(answer) == asked.plain()
    assert not asked.looks.asked


def test_a_service_without_an_engine_says_so_and_what_it_cannot_give_is_refused(store: Store):
    config = ServeConfig(rerank_seconds_limit=3.0)
    with TestClient(make_api(InProcess(store, config, ()), config, Gate(())), HERE) as client:
        body = {"query": QUERY, "rerank": {"seconds": 2}}
        assert client.post("/v1/search", json=body).json()["reranking"]["reason"].endswith("without rerank_engine")
        assert client.get("/readyz").json()["rerank_seconds"] is None
        for wrong, says in (
            ({"seconds": 3.5}, "seconds is too large: this service gives an engine 3"),
            ({"seconds": 1, "images": 21}, "images is too large: this service gives an engine 20"),
            ({"seconds": 0}, "greater than 0"),
            ({"seconds": 1, "images": 1}, "greater than or equal to 2"),
            ({}, "required"),
        ):
            refused = client.post("/v1/search", json={"query": QUERY, "rerank": wrong})
            assert refused.status_code == 422
            assert says in refused.json()["detail"][0]["msg"]
        (described,) = [client.get("/openapi.json").json()["components"]["schemas"]["Rerank"]["properties"]]
        assert (described["seconds"]["maximum"], described["images"]["maximum"]) == (3.0, 20)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="choose one of them"):
        ServeConfig(rerank=10, rerank_engine="oracle")
    with pytest.raises(ConfigError, match="at most half of timeout_s 8"):
        ServeConfig(rerank_engine="oracle", timeout_s=8)


def test_a_weight_belongs_to_its_engine_model_and_omega(store: Store, endpoint: ChatServer):
    digest, asked = find_edition(store).digest, settings(endpoint)
    assert asked.reranker is not None
    assert learned_weights(store, digest, asked.reranker) == {OMEGA: 1.0}
    assert learned_weights(store, digest, asked.reranker, neighbours=3) == {}
    assert learned_weights(store, "0" * 16, asked.reranker) == {}
    other = settings(endpoint, openai=OpenAIConfig(base_url=endpoint.url, model="another")).reranker
    assert other is not None
    assert learned_weights(store, digest, other) == {}
    few = EvaluateConfig(rerank_engine="openai", openai=asked.openai, rerank_images=5)
    close = EvaluateConfig(rerank_engine="openai", openai=asked.openai, rerank_margin=0.01)
    for config in (few, close):  # an evaluation that asked less counts less
        weaker = {"omega": OMEGA, "config": to_mapping(config), "reranking": {"weight": 2.0}}
        store.write_json(weaker, "evaluations", digest, "test-10-by-openai-0.json")
        assert learned_weights(store, digest, asked.reranker) == {OMEGA: 1.0}
    for damaged in ([], {"config": {"colour": 1}}, {"omega": "x"}):
        store.write_json(damaged, "evaluations", digest, "test-10-by-openai-0.json")
        assert learned_weights(store, digest, asked.reranker) == {OMEGA: 1.0}
    store.remove("evaluations", digest, "test-10-by-openai-0.json")


# --- the page and the real service ------------------------------------------------------------------------


def test_the_client_and_the_page_say_what_ranked_the_images(
    browser: Browser, store: Store, endpoint: ChatServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("serve.judge.OnDemand", InThisProcess)
    endpoint.reply = Looks(COUNT)
    config, port = settings(endpoint), free_port()
    api = make_api(WithEngine(store, config), config, Gate(()))
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            assert client.ready().rerank_seconds == 25.0
            assert client.search(QUERY).reranking is None
            while (answer := client.search(QUERY, rerank=Rerank(seconds=20, images=4))).reranking.by == "plain":
                assert "is starting" in answer.reranking.reason
            assert answer.reranking.questions == 16
            assert answer.hits[0].verdicts is not None
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/#q={QUERY}")
        closer = page.get_by_label("closer for")
        closer.fill("20")
        closer.press("Tab")
        expect(page.locator("#status")).to_contain_text("ranked again by the engine in")
        expect(page.locator("#grid .card").first).to_contain_text("fits: upper kind")
        assert "closer=20" in page.url
    finally:
        server.should_exit = True
        thread.join()


CLIENTS = 8
NAME = "reranked"
SECONDS = 1.0  # that a search gives the engine
LATER = 0.5  # seconds that a busy event loop may be late
# Descriptions of two claims each, so that what was asked in one phase does not answer in the next.
HAIR, SHOES = "a person with long brown hair", "a person in white boots"


class Crowd:
    """Eight clients. Each searches without the engine and with it, in turns, until it is stopped."""

    def __init__(self, url: str):
        self.url, self.query, self.going = url, QUERY, True
        self.plain: dict[str, list[str]] = {}  # the order of each query
        self.plain_s: list[float] = []
        self.answers: list[tuple[str, float, dict[str, Any]]] = []  # query, seconds, answer
        self.pool = ThreadPoolExecutor(CLIENTS)
        self.clients = [self.pool.submit(self._ask) for _ in range(CLIENTS)]

    def _ask(self) -> None:
        with httpx.Client(timeout=30) as http:
            while self.going:
                query = self.query
                seconds, answer = self._search(http, {"query": query})
                self.plain_s.append(seconds)
                order = [hit["image_id"] for hit in answer["hits"]]
                assert self.plain.setdefault(query, order) == order
                self.answers.append((query, *self._search(http, {"query": query, "rerank": {"seconds": SECONDS}})))

    def _search(self, http: httpx.Client, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        started = time.monotonic()
        answer = http.post(self.url, json={"top_k": 16, **body})
        assert answer.status_code == 200, answer.text
        return time.monotonic() - started, answer.json()

    def ask(self, query: str, until: Callable[[dict[str, Any]], bool]) -> None:
        """Ask this from now on, until every client has been answered like that."""
        self.query, since, deadline = query, len(self.answers), time.monotonic() + 60
        while sum(asked == query and until(how["reranking"]) for asked, _, how in self.answers[since:]) < CLIENTS:
            assert not any(client.done() for client in self.clients), [client.exception() for client in self.clients]
            assert time.monotonic() < deadline, [answer["reranking"] for _, _, answer in self.answers[-3:]]
            time.sleep(0.05)

    def stop(self) -> None:
        self.going = False
        for client in self.clients:
            client.result(60)


def kill_engines(since: float) -> int:
    """Kill the processes of engines that this process's cluster has started since; returns their number."""
    found = [process for process in own_processes("ray::Engine") if process.create_time() > since]
    for process in found:
        process.kill()
    return len(found)


@pytest.mark.slow
@pytest.mark.long
def test_eight_clients_are_answered_in_time_while_the_engine_comes_and_goes(
    running: Running, endpoint: ChatServer, store: Store
) -> None:
    endpoint.reply = looks = Looks(COUNT)
    since = time.time()
    app = application(find_edition(store), settings(endpoint))
    ray_serve.run(app, name=NAME, route_prefix=f"/{NAME}", logging_config=QUIET)
    try:
        with httpx.Client(base_url=f"{running.url}/{NAME}", timeout=60) as client:
            wait_until_ready(client)
        crowd = Crowd(f"{running.url}/{NAME}/v1/search")
        try:
            crowd.ask(QUERY, lambda how: how["by"] == "engine" and how["answered"] == 40)
            looks.seconds = 30.0
            crowd.ask(HAIR, lambda how: how["by"] == "plain" and "have no verdict within 1 s" in how["reason"])
            crowd.ask(QUERY, lambda how: how["by"] == "engine" and how["known"] == 40)  # known, without the engine
            looks.seconds = 0.0
            assert kill_engines(since) == 1
            crowd.ask(SHOES, lambda how: how["by"] == "plain" and how["answered"] == 0)
            (judge,) = [actor for actor in list_named_actors(all_namespaces=True) if f"{NAME}#Judge#" in actor["name"]]
            ray.kill(ray.get_actor(judge["name"], namespace=judge["namespace"]), no_restart=True)
            crowd.ask(SHOES, lambda how: how["by"] == "engine" and not how["reason"])  # another judge and engine
        finally:
            crowd.stop()
    finally:
        ray_serve.delete(NAME)
    by = Counter(answer["reranking"]["by"] for _, _, answer in crowd.answers)
    slowest = max(seconds for _, seconds, _ in crowd.answers)
    print(f"{dict(by)}, slowest {slowest:.2f} s, slowest plain search {max(crowd.plain_s):.2f} s")
    for query, seconds, answer in crowd.answers:
        order, how = [hit["image_id"] for hit in answer["hits"]], answer["reranking"]
        assert how["seconds"] < seconds < SECONDS + max(crowd.plain_s) + LATER
        if how["by"] == "plain":
            assert how["reason"]
            assert order == crowd.plain[query]
        else:
            assert 0 < how["answered"] <= how["questions"]
            assert (how["answered"] == how["questions"]) == (how["reason"] == "")
            assert order[10:] == crowd.plain[query][10:]
