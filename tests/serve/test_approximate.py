"""Approximate search says so: in Python, in the shell and over HTTP."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

import ceca
from ceca.config import IndexConfig, ServeConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.search import sketches
from ceca.search.edition import find_edition
from ceca.settings import ConfigError
from jobs.index import index
from jobs.search import search
from serve.access import Gate
from serve.api import make_api
from serve.app import application
from tests.serve.dataset import QUERY, publish_gallery, publish_people, publish_tiny
from tests.serve.inside import InProcess
from tests.stages import in_this_process


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("approximate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CECA_CACHE", str(folder / "cache"))
        store = Store(str(folder / "data"))
        publish_people(store, 17)
        publish_gallery(store, *publish_tiny(store, "tiny", seed=0), "tiny")
        yield store


def test_answers_over_http_say_that_they_are_approximate(store: Store):
    answers = {}
    for share in (0.0, 0.5):
        config = ServeConfig(approximate=share)
        service = TestClient(make_api(InProcess(store, config, ()), config, Gate(())), "http://localhost:8000")
        answers[share] = service.post("/v1/search", json={"query": QUERY, "where": {"camera": ["c1"]}}).json()
    assert [answers[share]["approximate"] for share in answers] == [False, True]
    assert answers[0.5]["hits"] == answers[0.0]["hits"]  # of so few images that fulfil the condition, all are compared


def test_so_do_those_in_python_and_in_the_shell(store: Store, capsys: pytest.CaptureFixture):
    exact, near = ceca.open(store.uri).search(QUERY, k=3), ceca.open(store.uri, approximate=0.5).search(QUERY, k=3)
    assert (exact.approximate, near.approximate) == (False, True)
    assert [hit.image_id for hit in near] == [hit.image_id for hit in exact]
    assert "(approximate)" in str(near)
    search(QUERY, data=store.uri, top_k=1, approximate=0.5)
    assert "(approximate)" in capsys.readouterr().err


def test_what_is_no_share_and_a_gpu_are_refused(store: Store):
    with pytest.raises(UserError, match="share from 0 to 1, found 2"):
        ceca.open(store.uri, approximate=2)
    with pytest.raises(UserError, match="--approximate must be between 0 and 1"):
        search(QUERY, data=store.uri, approximate=-1)
    with pytest.raises(ConfigError, match="made for CPUs"):
        ServeConfig(approximate=0.5, gpus=0.5)


def test_the_recall_of_a_gallery_is_measured_and_a_service_asks_for_enough(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def serve(share: float) -> None:
        application(find_edition(store), ServeConfig(approximate=share, least_recall=0.9, open=True))

    config = IndexConfig(model="tiny", approximate=0.12)
    with in_this_process():
        index(store.uri, IndexConfig(model="tiny"))
        with pytest.raises(UserError, match=r"compares 12.00% of gallery \w+ has not been measured: run `ceca index"):
            serve(0.12)
        index(store.uri, config)  # does not embed again
        rows = store.read(store.current("recall")).to_pylist()
        assert [row["omega"] for row in rows] == [0.0, 0.3, 1.0]
        assert {(row["top_k"], row["queries"], row["recall"]) for row in rows} == {(10, 17, 1.0)}  # all are compared
        serve(0.12)
        serve(0)
        with pytest.raises(UserError, match="has not been measured"):
            serve(0.005)

        monkeypatch.setattr(sketches, "PER_HIT", 0)  # as over a large gallery: two of 16 images are compared
        index(store.uri, config, redo=True)
    with pytest.raises(UserError, match=r"finds 20.0% of the ten best images, and 90.0% are asked for"):
        serve(0.12)
    said = " ".join(capsys.readouterr().err.split())
    assert "is published already" in said
    assert "recall: comparing 12.00% of the images exactly finds 20.0% of the ten best" in said
