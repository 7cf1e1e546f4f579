"""`import ceca`: a dataset and a model in Python."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ceca
from ceca.data.changes import hide
from ceca.data.schema import IMAGES, NOBODY, TIME
from ceca.data.store import Receipt, Store, StoreError
from ceca.errors import UserError
from ceca.people import similarity
from tests.conftest import REPOSITORY
from tests.notebook import run_notebook
from tests.serve.dataset import QUERY, draw_person, publish_gallery, publish_people, publish_tiny, summarize


def _has_duckdb() -> bool:
    return importlib.util.find_spec("duckdb") is not None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("people")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CECA_CACHE", str(folder / "cache"))
        store = Store(str(folder / "data"))
        publish_people(store, 9)
        publish_gallery(store, *publish_tiny(store, "tiny", seed=0), "tiny")
        yield store


def test_the_import_is_cheap_and_brings_no_ray():
    code = "import ceca, sys; print(*{'torch', 'pyarrow', 'ray', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
    assert ceca.metrics.__name__ == "ceca.metrics"
    assert {"losses", "metrics", "open", "load", "People"} <= set(ceca.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lost'"):
        ceca.lost  # noqa: B018


def test_tables_and_the_places_of_their_parts(store: Store):
    people = ceca.open(store.uri)
    assert {"images", "captions", "dialogues", "gallery"} <= set(people.tables)
    assert people.table("captions").num_rows == 9
    assert people.table("images", ["image_id", "camera"]).column_names == ["image_id", "camera"]
    parts = people.parts("images")
    assert [Path(part).is_absolute() and Path(part).exists() for part in parts] == [True, True]
    assert pa.concat_tables([pq.read_table(part) for part in parts]).equals(people.table("images"))
    assert "rejects/ingest" in people.tables
    assert people.table("rejects/ingest").num_rows == 0
    with pytest.raises(UserError, match=r"no table 'pictures' in .*; there are: captions, dialogues, gallery, images"):
        people.table("pictures")
    with pytest.raises(UserError, match=r"no column colour; it has image_id, identity"):
        people.table("images", ["colour"])
    assert "captions, dialogues" in repr(people)
    assert repr(ceca.open(str(Path(store.uri).parent / "nowhere"))).endswith(": no table")


def test_parts_of_which_some_have_a_time_are_one_table(tmp_path: Path):
    store = Store(str(tmp_path))
    row = {
        "image_id": "0" * 16,
        "identity": NOBODY,
        "split": "test",
        "image": b"",
        "width": 1,
        "height": 1,
        "source_path": "a",
    }
    receipts = []
    for number, schema in enumerate((IMAGES, IMAGES.append(TIME))):
        receipts.append(
            Receipt({"images": store.write_part("images", "1", number, pa.Table.from_pylist([row], schema))})
        )
    store.publish("ingest", "1", ("images",), receipts, made_from={}, config={})
    assert ceca.open(store.uri).table("images")["time"].to_pylist() == [None, None]
    assert ceca.open(store.uri).table("images", ["image_id", "time"]).num_rows == 2


def test_a_search_gives_pictures_and_a_notebook_shows_them(store: Store):
    hits = ceca.open(store.uri).search(QUERY, k=3)
    assert len(hits) == 3
    assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    first = hits[0]
    assert re.fullmatch(r"\d{4}\.jpg", first.source_path)
    assert first.image.size == (64, 160)
    assert first.content == draw_person(int(first.source_path[:4]))
    shown = hits._repr_html_()
    assert shown.count("<img src=") == 3
    assert str(hits).count(".jpg") == 3
    assert hits.table().column_names[:2] == ["image_id", "identity"]
    assert len(ceca.open(store.uri).search(QUERY, k=9, where={"camera": ["c1"]})) == 3
    for wrong in ({"query": " "}, {"query": "a", "k": 0}, {"query": "a", "omega": 2}):
        with pytest.raises(UserError, match="a search needs words"):
            ceca.open(store.uri).search(**wrong)


def test_what_was_removed_is_not_found_by_a_dataset_opened_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    store = Store(str(tmp_path / "<data>"))
    publish_people(store, 5)
    publish_gallery(store, *publish_tiny(store, "tiny", seed=0), "tiny")
    before = ceca.open(store.uri).search("<b>a person</b>", k=9)
    assert "<b>" not in before._repr_html_()
    hide(store, [before[0].image_id])
    after = ceca.open(store.uri).search("<b>a person</b>", k=9)
    assert {hit.image_id for hit in after} == {hit.image_id for hit in before} - {before[0].image_id}


def test_a_model_embeds_as_the_gallery_was_embedded(store: Store):
    model = ceca.load(f"{store.uri}/models/tiny")
    gallery = ceca.open(store.uri).table("gallery").to_pylist()
    images = ceca.open(store.uri).table("images").to_pylist()[: len(gallery)]
    summaries = [summarize(number) for number in range(len(gallery))]
    embedded = model.embed_gallery([row["image"] for row in images], summaries)
    for side, name in zip(embedded, ("global", "local"), strict=True):
        assert side.dtype == np.float32
        np.testing.assert_allclose(side, np.array([row[name] for row in gallery], np.float32), atol=2e-3)
    queries = model.embed_queries([QUERY, "a man"])
    best = similarity(queries, embedded)[0].argsort()[::-1][:3]
    hits = ceca.open(store.uri).search(QUERY, k=3)
    assert [images[number]["image_id"] for number in best] == [hit.image_id for hit in hits]
    assert "ceca-tiny@" in repr(model)


def test_images_are_taken_as_people_have_them(store: Store, tmp_path: Path):
    model = ceca.load("tiny", store.uri)
    content = draw_person(4)  # a PNG, so that all ways have the same pixels
    (tmp_path / "a.png").write_bytes(content)
    given = [content, str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(io.BytesIO(content))]
    embedded = model.embed_gallery(given)
    for side in embedded:
        np.testing.assert_allclose(side, np.repeat(side[:1], 4, axis=0), atol=1e-5)
    with pytest.raises(UserError, match="4 images and 1 summaries"):
        model.embed_gallery(given, ["a man"])
    with pytest.raises(UserError, match="takes a list of texts"):
        model.embed_queries("a man")
    with pytest.raises(UserError, match="nothing to embed"):
        model.embed_queries([])
    with pytest.raises(StoreError, match=r"no published model 'absent'.*there: tiny"):
        ceca.load("absent", store.uri)


def test_sql_needs_duckdb_and_says_so(store: Store):
    people = ceca.open(store.uri)
    if not _has_duckdb():
        with pytest.raises(UserError, match="pip install duckdb"):
            people.sql("SELECT 1")
        return
    answer = people.sql("SELECT split, count(*) AS n FROM images JOIN captions USING (image_id, split) GROUP BY split")
    assert {row["split"]: row["n"] for row in answer.to_pylist()} == {"test": 8, "train": 1}


def test_the_notebook_runs_and_shows_pictures(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", store.uri)
    shown = run_notebook(REPOSITORY / "docs" / "people.ipynb")
    assert shown[1].count("<img") == 5
    assert "0.0" in shown[-1]
    assert shown[-1].count("[") == 3  # two queries


def test_the_examples_of_the_guide_run_as_they_are_written(store: Store, capsys: pytest.CaptureFixture):
    page = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        if "duckdb" in block and not _has_duckdb():
            continue
        exec(block.replace("demo/data", store.uri).replace("models/ceca", "models/tiny"), names)
    assert "jpg" in capsys.readouterr().out
