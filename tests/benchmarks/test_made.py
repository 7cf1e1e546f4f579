"""The dataset that benchmarks are run on is one that the stages could have made."""

from __future__ import annotations

import numpy as np

from benchmarks.made import make_dataset
from ceca.data import schema
from ceca.data.store import Store
from ceca.datasets.images import check_image

IMAGES = 300


def test_a_made_dataset_has_the_schema_and_its_tables_fit_together():
    store = make_dataset("memory://made", IMAGES, model=False)
    tables = {name: store.read(store.current(name)) for name in ("images", "captions", "dialogues", "gallery")}
    widths = (512, 1024)
    assert tables["images"].schema.equals(schema.IMAGES)
    assert tables["captions"].schema.equals(schema.CAPTIONS)
    assert tables["gallery"].schema.equals(schema.gallery(*widths))
    ids = tables["images"]["image_id"]
    assert ids.to_pylist() == [schema.image_id(path) for path in tables["images"]["source_path"].to_pylist()]
    assert len(set(ids.to_pylist())) == IMAGES
    assert tables["dialogues"]["image_id"] == tables["gallery"]["image_id"] == ids
    assert tables["captions"]["image_id"].to_pylist() == np.repeat(ids.to_pylist(), 2).tolist()
    assert check_image(tables["images"]["image"][0].as_py()) == (16, 48)
    assert len(set(tables["dialogues"]["summary"].to_pylist())) > 0.99 * IMAGES
    assert [len(turns) for turns in tables["dialogues"]["turns"].to_pylist()] == [5] * IMAGES
    norms = [np.linalg.norm(row) for row in tables["gallery"]["global"].to_pylist()]
    np.testing.assert_allclose(norms, 1, atol=1e-2)


def test_a_dataset_that_is_there_is_not_made_again():
    made = make_dataset("memory://twice", 10, model=False, widths=None).current("dialogues")
    again: Store = make_dataset("memory://twice", 10, model=False, widths=None)
    assert again.current("dialogues").created == made.created
    assert again.manifest("gallery") is None
