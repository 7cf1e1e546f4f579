"""`ceca evaluate --rerank-engine`: an engine looks at the best images of each query, and is asked nothing twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ceca.config import EvaluateConfig, OracleConfig
from ceca.data.erase import erase
from ceca.data.names import VERDICTS
from ceca.data.store import Store
from ceca.dialogue.attributes import read_vocabulary
from ceca.dialogue.verdicts import engine_digest, learned_weights, stated
from ceca.errors import UserError
from ceca.settings import ConfigError
from jobs.evaluate import evaluate
from jobs.reports.page import reranked_section
from tests.serve.dataset import publish_people, publish_tiny
from tests.stages import in_this_process

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def data(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Drawn people with dialogues, and a model with random weights."""
    from jobs import dialogue, ingest

    uri = str(tmp_path_factory.mktemp("reranked"))
    with in_this_process():
        ingest.main(["--source", str(drawn), "--data", uri])
        dialogue.main(["--data", uri, "--engine", "oracle"])
    publish_tiny(Store(uri), "ceca", seed=0)
    return uri


def settings(error_rate: float, images: int = 10, margin: float | None = None) -> EvaluateConfig:
    oracle = OracleConfig(error_rate=error_rate)
    return EvaluateConfig(rerank_engine="oracle", rerank_images=images, rerank_margin=margin, oracle=oracle)


def test_an_engine_that_knows_the_truth_raises_the_figures_at_the_stated_cost(data: str):
    store = Store(data)
    result = evaluate(data, settings(0.0))
    fused, reranked = result["metrics"]["fused"], result["metrics"]["reranked"]
    assert reranked["mean_average_precision"] > fused["mean_average_precision"] + 10
    assert reranked["rank1"] > fused["rank1"]
    cost = result["reranking"]
    assert cost["weight"] > 0
    gain = reranked["mean_average_precision"] - fused["mean_average_precision"]
    assert cost["differences"]["AP"]["mean"] == pytest.approx(gain)
    # Each caption's claims are asked about ten images.
    images = store.current("images")
    captions = store.read(store.captions(images)).to_pylist()
    vocabulary = read_vocabulary(store, images)
    claims = [stated(row["text"], vocabulary) for row in captions if row["split"] == "test"]
    assert cost["questions"] == 10 * sum(map(len, claims))
    assert cost["queries_asked"] == len(claims) == result["queries"]
    assert cost["different_questions"] < cost["questions"]
    assert cost["engine_seconds_per_query"] > 0
    engine = settings(0.0).engine
    assert engine is not None
    assert learned_weights(store, result["model_digest"], engine) == {result["omega"]: cost["weight"]}  # for searches
    stored = [name for name in store.names("evaluations", result["model_digest"]) if "-10-by-oracle-" in name]
    assert len(stored) == 2  # the result, and the figures of every query


def test_what_is_known_is_not_asked_again(data: str):
    first = evaluate(data, settings(0.15, images=6))["reranking"]
    assert first["asked_now"] > 0
    again = evaluate(data, settings(0.15, images=6))["reranking"]
    assert again["asked_now"] == 0
    assert {**again, "asked_now": first["asked_now"]} == first
    assert evaluate(data, settings(0.15, images=3))["reranking"]["asked_now"] == 0
    more = evaluate(data, settings(0.15, images=8))["reranking"]
    assert 0 < more["asked_now"] < more["different_questions"]


def test_an_engine_that_is_always_wrong_changes_nothing(data: str):
    result = evaluate(data, settings(1.0))
    assert result["reranking"]["weight"] == 0
    assert result["metrics"]["reranked"] == result["metrics"]["fused"]


def test_the_report_has_a_row_for_each_engine_without_and_with_re_ranking(data: str):
    results = [evaluate(data, settings(error_rate)) for error_rate in (0.0, 1.0)]
    ((title, parts),) = reranked_section(Store(data), ("ceca",), "test")
    html = "".join(parts)
    assert title == "Re-ranking by an engine"
    for result, name in zip(results, ("simulated, error rate 0", "simulated, error rate 1"), strict=True):
        before, after = (result["metrics"][key]["mean_average_precision"] for key in ("fused", "reranked"))
        assert name in html
        assert f"{before:.2f} → {after:.2f}" in html
    assert reranked_section(Store(data), ("ceca",), "val") == []


def test_only_close_queries_are_asked_about(data: str):
    cost = evaluate(data, settings(0.0, margin=1e-4))
    every = evaluate(data, settings(0.0))
    assert 0 < cost["reranking"]["queries_asked"] < every["reranking"]["queries_asked"]


def test_verdicts_of_an_erased_image_are_erased(data: str, tmp_path: Path):
    shutil.copytree(data, tmp_path / "copy")
    store, config = Store(str(tmp_path / "copy")), settings(0.0)
    evaluate(store.uri, config)
    assert config.engine is not None
    table = f"{VERDICTS}/{engine_digest(config.engine)}"
    images = {row["image_id"] for row in store.read(store.current(table)).to_pylist()}
    gone = min(images)
    erase(store, {gone})
    assert {row["image_id"] for row in store.read(store.current(table)).to_pylist()} == images - {gone}


def test_without_a_validation_split_no_weight_can_be_learned(tmp_path: Path):
    store = Store(str(tmp_path))
    publish_people(store, 17)
    publish_tiny(store, "ceca", seed=0)
    with pytest.raises(UserError, match="learned on the split val, and"):
        evaluate(store.uri, EvaluateConfig(rerank_engine="oracle"))


def test_both_kinds_of_re_ranking_at_once_are_refused():
    with pytest.raises(ConfigError, match="choose one of them"):
        EvaluateConfig(rerank=50, rerank_engine="oracle")
