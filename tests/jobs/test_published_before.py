"""A dataset that an earlier program published: the same versions, and nothing is done again.

published/before.tar.xz was made by this project's 0.1.0 (20 drawn images, a model trained for one epoch) and lacks the
weights, which nothing here reads.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ceca.data.keys import spelled
from ceca.data.store import Store
from ceca.data.tables import find_images
from ceca.model.registry import require_model
from ceca.search.catalogue import Catalogue
from ceca.search.edition import find_edition
from ceca.search.gallery import open_gallery
from jobs.pipeline import pipeline

ARCHIVE = Path(__file__).parent / "published" / "before.tar.xz"


@pytest.fixture
def before(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files but the figures, which an evaluation writes each time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".json"]
    files = [path for path in files if not path.name.endswith(".queries.parquet")]
    manifests = sorted(folder.rglob("manifest.json"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files + manifests}


def test_every_stage_finds_its_result_published_and_does_nothing(before: Path) -> None:
    data, store = before / "data", Store(str(before / "data"))
    was = contents(data)
    model = require_model(store, "ceca")
    evaluation = data / "evaluations" / model.digest / "test.json"
    figures = json.loads(evaluation.read_text())["metrics"]
    of_queries = pq.read_table(evaluation.with_suffix(".queries.parquet"))
    pipeline(str(data), str(before / "drawn"), str(before / "recipe.yaml"))
    assert contents(data) == was
    assert json.loads(evaluation.read_text())["metrics"] == figures
    again = pq.read_table(evaluation.with_suffix(".queries.parquet"))  # with further columns since
    assert again.select(of_queries.column_names).equals(of_queries)


def test_its_tables_and_gallery_are_read_as_they_are(before: Path) -> None:
    store = Store(str(before / "data"))
    assert len(find_images(store, store.current("images"))) == 20
    edition = find_edition(store)
    gallery, catalogue = open_gallery(edition), Catalogue(edition)
    assert len(gallery.ids) == 4
    for image_id in spelled(gallery.ids):
        assert catalogue.picture(image_id) is not None
        assert catalogue.summary(image_id)
