"""The index: killed, added to, without removed people, after another summary. Begins from the undisturbed pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ceca.data.keys import spelled
from ceca.data.store import Receipt, Store
from ceca.errors import UserError
from ceca.search.edition import find_edition
from ceca.search.gallery import open_gallery
from ceca.search.searcher import Searcher
from jobs.dialogue import dialogue
from jobs.index import index
from jobs.ingest import ingest
from jobs.pipeline import recipe_config
from jobs.remove import remove
from tests.drills.conftest import RECIPE
from tests.jobs.test_stages import digests, kill_after_some_units
from tests.stages import in_this_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = ("--recipe", RECIPE)


def test_index_killed_and_started_again_ends_with_the_same_table(start, run, undisturbed, tmp_path):
    shutil.copytree(undisturbed.root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "gallery")
    store = Store(str(tmp_path))
    kill_after_some_units(start, store, "index", *SETTINGS, "--data", tmp_path)
    assert store.manifest("gallery") is None
    assert "continuing" in run("index", *SETTINGS, "--data", tmp_path).stdout
    assert digests(store, "gallery") == digests(undisturbed, "gallery")


def rows_by_id(store: Store) -> dict[str, np.ndarray]:
    """What the current gallery holds of each image, [D + E]."""
    gallery = open_gallery(find_edition(store))
    return dict(zip(spelled(gallery.ids), torch.cat(gallery.rows.shards).float().numpy(), strict=True))


@pytest.fixture(scope="module")
def half_indexed(drawn, undisturbed, tmp_path_factory) -> Path:
    """A gallery of fewer images, after which the others have come and have been asked about."""
    data = tmp_path_factory.mktemp("growing")
    shutil.copytree(undisturbed.root, data, dirs_exist_ok=True)
    for table in ("images", "captions", "dialogues", "gallery"):
        shutil.rmtree(data / table)
    with in_this_process():
        ingest(str(data), recipe_config(RECIPE, "ingest", source=str(drawn), limit=64))
        dialogue(str(data), recipe_config(RECIPE, "dialogue"))
        index(str(data), recipe_config(RECIPE, "index"))
        ingest(str(data), recipe_config(RECIPE, "ingest", source=str(drawn)))
        dialogue(str(data), recipe_config(RECIPE, "dialogue", only_missing=True))
    return data


def test_adding_images_writes_new_parts_only_and_a_kill_leaves_the_old_version(
    start, run, undisturbed, half_indexed, tmp_path
):
    shutil.copytree(half_indexed, tmp_path, dirs_exist_ok=True)
    store = Store(str(tmp_path))
    before, old = store.current("gallery"), rows_by_id(store)
    adding = ("index", *SETTINGS, "--data", tmp_path, "--only-missing")
    kill_after_some_units(start, store, *adding)
    assert store.current("gallery") == before
    assert len(Searcher(store).search("a woman in a red coat", omega=0.3, top_k=100)) == before.rows
    finished = run(*adding).stdout
    assert "continuing" in finished
    after, new = store.current("gallery"), rows_by_id(store)
    assert set(after.parts) > set(before.parts)
    assert 0 < before.rows < after.rows == undisturbed.current("gallery").rows
    for image_id, row in rows_by_id(undisturbed).items():  # as if all had been embedded together, and untouched
        np.testing.assert_allclose(new[image_id], row, atol=2e-3)
        assert image_id not in old or np.array_equal(new[image_id], old[image_id])
    assert "lacks nothing" in run(*adding).stdout


def test_removed_people_are_out_of_search_at_once_and_out_of_the_parts_after_the_next_index(do, undisturbed, tmp_path):
    shutil.copytree(undisturbed.root, tmp_path, dirs_exist_ok=True)
    store = Store(str(tmp_path))
    table = store.read(store.current("gallery"), ["image_id", "identity"])
    person = table["identity"][0].as_py()
    ids = {row["image_id"] for row in table.to_pylist() if row["identity"] == person}
    do("index", "--recipe", "tiny", "--data", tmp_path, "--redo")  # one part, which holds other people too

    assert remove(str(tmp_path), identities=(person,)) == ids
    hits = Searcher(store).search("a woman in a red coat", omega=0.3, top_k=1000)
    assert len(hits) == table.num_rows - len(ids)
    assert not ids & {hit.image_id for hit in hits}

    assert "are copied, 0 images" in do("index", "--recipe", "tiny", "--data", tmp_path, "--only-missing")
    compacted = store.read(store.current("gallery"))
    assert compacted.num_rows == table.num_rows - len(ids)
    assert not ids & set(compacted["image_id"].to_pylist())
    for taken in (("--only-missing",), ("--redo",)):
        do("index", "--recipe", "tiny", "--data", tmp_path, *taken)
        assert store.current("gallery").rows == table.num_rows - len(ids)
    with pytest.raises(UserError, match="has no image nobody; nothing is removed"):
        remove(str(tmp_path), images=("nobody",))


@pytest.mark.long
def test_an_image_with_another_summary_is_embedded_again_and_the_others_are_not(run, undisturbed, tmp_path):
    shutil.copytree(undisturbed.root, tmp_path, dirs_exist_ok=True)
    store = Store(str(tmp_path))
    before = rows_by_id(store)
    told = store.read(store.current("dialogues"))
    changed = sorted(before)[0]
    summaries = [
        "a man in a yellow cap with a green bag" if image_id == changed else summary
        for image_id, summary in zip(told["image_id"].to_pylist(), told["summary"].to_pylist(), strict=True)
    ]
    new = told.set_column(told.schema.get_field_index("summary"), told.schema.field("summary"), [summaries])
    part = store.write_part("dialogues", "another", 0, new)
    made_from = store.current("dialogues").made_from
    store.publish("dialogue", "another", ("dialogues",), [Receipt({"dialogues": part})], made_from=made_from, config={})

    run("index", *SETTINGS, "--data", tmp_path, "--only-missing")
    after = rows_by_id(store)
    assert [image_id for image_id in before if not np.array_equal(before[image_id], after[image_id])] == [changed]
