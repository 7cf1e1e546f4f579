"""Confidence in the first hit, and `min_confidence`: in Python, in the shell, over HTTP and on the page."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

import ceca
from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.search.confidence import Calibration, NoConfidence
from ceca.search.searcher import Searcher
from cluster.object_store import free_port
from jobs.search import search
from serve.access import Gate
from serve.api import make_api
from serve.client import Client
from tests.serve.dataset import QUERY, publish_gallery, publish_people, publish_tiny
from tests.serve.inside import InProcess

HERE = "http://localhost:8000"
# The similarities of a model with random weights are all near 0.5.
CALIBRATION = Calibration(0.3, 16, (-1.0, 1.0), (0.1, 0.9), ((0.05, 0.8),))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CECA_CACHE", str(folder / "cache"))
        store = Store(str(folder / "data"))
        publish_people(store, 17)
        model, published = publish_tiny(store, "tiny", seed=0)
        publish_gallery(store, model, published, "tiny")
        kept = {"calibration": dataclasses.asdict(CALIBRATION)}
        store.write_json(kept, "evaluations", published.digest, "val.json")
        yield store


@pytest.fixture(scope="module")
def service(store: Store) -> Iterator[TestClient]:
    config = ServeConfig()
    with TestClient(make_api(InProcess(store, config, ()), config, Gate(())), HERE) as client:
        yield client


@pytest.fixture(scope="module")
def confidence(store: Store) -> float:
    """Of the first hit for `QUERY`."""
    (hit,) = Searcher(store).search(QUERY, omega=0.3, top_k=1)
    return float(CALIBRATION.confidence(hit.similarity, 16))


def test_python_has_the_confidence_and_no_hits_below_the_least(store: Store, confidence: float):
    people = ceca.open(store.uri)
    hits = people.search(QUERY, k=2)
    assert hits.confidence == pytest.approx(confidence)
    assert f"confidence {confidence:.2f}" in str(hits)
    assert len(people.search(QUERY, k=2, min_confidence=confidence - 0.01)) == 2
    nobody = people.search(QUERY, k=2, min_confidence=confidence + 0.01)
    assert len(nobody) == 0
    assert "probably nobody" in str(nobody)
    assert people.search(QUERY, k=2, omega=0.5).confidence is None
    with pytest.raises(NoConfidence, match=r"calibrated for ω = 0\.3"):
        people.search(QUERY, omega=0.5, min_confidence=0.1)
    with pytest.raises(UserError, match="min_confidence from 0 to 1"):
        people.search(QUERY, min_confidence=1.5)


def test_fewer_images_leave_fewer_strangers_to_confuse(store: Store):
    some = ceca.open(store.uri).search(QUERY, where={"camera": ["c0"]})
    expected = CALIBRATION.confidence(some[0].similarity, 6)
    assert some.confidence == pytest.approx(expected)
    assert some.confidence > CALIBRATION.confidence(some[0].similarity, 16)


def test_the_shell_says_who_is_probably_nobody(store: Store, confidence: float, capsys: pytest.CaptureFixture):
    search(QUERY, store.uri, min_confidence=confidence + 0.01)
    assert f"probably nobody: the first hit has confidence {confidence:.2f}" in capsys.readouterr().err
    search(QUERY, store.uri, min_confidence=confidence - 0.01)
    assert f"(confidence {confidence:.2f})" in " ".join(capsys.readouterr().err.split())
    for changed in ({"rerank": 5}, {"neighbours": 2}):
        with pytest.raises(NoConfidence, match="without neighbours and re-ranking"):
            search(QUERY, store.uri, min_confidence=0.5, **changed)
    with pytest.raises(UserError, match="--min-confidence must be between 0 and 1"):
        search(QUERY, store.uri, min_confidence=-0.1)


def test_http_answers_with_the_confidence_on_every_page(service: TestClient, confidence: float):
    for body in ({}, {"offset": 5}, {"suggest": True}, {"answers": {"upper_colour": "red"}}):
        answer = service.post("/v1/search", json={"query": QUERY, **body}).json()
        assert answer["confidence"] == pytest.approx(confidence, abs=1e-4)
        assert answer["hits"]
    assert service.post("/v1/search", json={"query": QUERY, "omega": 0.4}).json()["confidence"] is None
    image = answer["hits"][0]["image_id"]
    assert service.post("/v1/search/like", json={"image_id": image}).json()["confidence"] is None
    assert service.get("/readyz").json()["calibrated_omega"] == 0.3


@pytest.mark.parametrize("body", [{}, {"suggest": True}])
def test_http_gives_no_hit_below_the_least_confidence(service: TestClient, confidence: float, body: dict):
    asked = {"query": QUERY, **body}
    assert service.post("/v1/search", json={**asked, "min_confidence": confidence - 0.01}).json()["hits"]
    answer = service.post("/v1/search", json={**asked, "min_confidence": confidence + 0.01}).json()
    assert answer["hits"] == []
    assert answer["next_offset"] is None
    assert answer["question"] is None
    assert answer["confidence"] == pytest.approx(confidence, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "says"),
    [({"omega": 0.5}, "calibrated for ω = 0.3"), ({}, "needs a model whose validation split was evaluated")],
)
def test_http_refuses_a_least_confidence_that_it_cannot_know(store: Store, service: TestClient, body: dict, says: str):
    if not body:
        config = ServeConfig(rerank=5)
        service = TestClient(make_api(InProcess(store, config, ()), config, Gate(())), HERE)
        assert service.get("/readyz").json()["calibrated_omega"] is None
    response = service.post("/v1/search", json={"query": QUERY, "min_confidence": 0.5, **body})
    assert response.status_code == 422
    (problem,) = response.json()["detail"]
    assert problem["loc"] == ["body", "min_confidence"]
    assert says in problem["msg"]


@pytest.fixture
def address(store: Store) -> Iterator[str]:
    """A service on a port of this machine, without Ray."""
    config, port = ServeConfig(approximate=1), free_port()  # all images are compared, and the page says what it may say
    api = make_api(InProcess(store, config, ()), config, Gate(()))
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_the_page_and_the_client_say_that_probably_nobody_fits(browser: Browser, address: str, confidence: float):
    with Client(address) as client:
        assert client.search(QUERY).confidence == pytest.approx(confidence, abs=1e-4)
        assert client.search(QUERY, min_confidence=confidence + 0.01).hits == ()
        assert list(client.search_all(QUERY, min_confidence=confidence + 0.01)) == []
        assert len(list(client.search_all(QUERY, min_confidence=confidence - 0.01))) == 16
    page = browser.new_page()
    page.goto(address)
    page.get_by_label("Description of the person").fill(QUERY)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#status")).to_contain_text("with a confidence of")
    expect(page.locator("#status")).to_contain_text("approximate: some of the best may be missing")
    sure = page.get_by_label("% sure")
    sure.fill("99")
    sure.press("Tab")
    expect(page.get_by_text("Probably nobody here fits this description")).to_be_visible()
    expect(page.locator("#grid .card")).to_have_count(0)
    assert "sure=99" in page.url
    page.get_by_role("button", name="Show the best images anyway").click()
    expect(page.locator("#grid .card")).to_have_count(10)
    assert "sure" not in page.url
    assert httpx.get(address).status_code == 200
