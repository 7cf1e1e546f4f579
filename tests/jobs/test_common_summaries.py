"""`ceca dialogue --agree`: one summary for images that are known to be one person; in test nobody knows who is who."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.config import DialogueConfig, IngestConfig, OpenAIConfig, OracleConfig
from ceca.data.changes import hide
from ceca.data.erase import finish
from ceca.data.groups import number_groups
from ceca.data.keys import spelled
from ceca.data.schema import NOBODY
from ceca.data.store import Manifest, Store
from ceca.data.tables import Images, find_dialogues, find_images, list_images
from ceca.dialogue.common import MOST_VIEWS, spread, wording
from ceca.dialogue.conversation import View
from ceca.errors import UserError
from jobs.dialogue import dialogue
from jobs.dialogues.common import plan_units
from jobs.index import _unchanged
from jobs.ingest import ingest
from jobs.runtime import units
from jobs.runtime.records import rows_in
from tests.endpoint import ChatServer, completion
from tests.stages import in_this_process

ORACLE = DialogueConfig(engine="oracle", oracle=OracleConfig(hidden_error_rate=0.6), images_per_part=5)
BY_IDENTITY = dataclasses.replace(ORACLE, agree="identity")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three people of train and two of test, in two tracklets of two pictures each."""
    from ceca.datasets.drawn import draw_dataset

    folder = tmp_path_factory.mktemp("walks")
    draw_dataset(
        folder / "drawn", seed=3, identities=5, layout="rstpreid", split_identities=(3, 0, 2), level="medium", workers=1
    )
    with in_this_process():
        ingest(str(folder / "data"), IngestConfig(source=str(folder / "drawn")))
    return folder / "data"


@pytest.fixture
def store(prepared: Path, tmp_path: Path, without_ray: None) -> Store:
    """A dataset of its own without dialogues."""
    shutil.copytree(prepared, tmp_path / "data")
    return Store(str(tmp_path / "data"))


def known(store: Store) -> dict[str, dict[str, Any]]:
    """Image id → what the tables say of it."""
    images = store.read(store.current("images"), ["image_id", "identity", "split", "tracklet"]).to_pylist()
    found = {row["image_id"]: row for row in images}
    columns = ["image_id", "summary", "own_summary", "summary_of"]
    for row in store.read(store.current("dialogues"), columns).to_pylist():
        found[row["image_id"]] |= row
    return found


# --- groups -----------------------------------------------------------------------------------------------


def rows_of(*rows: tuple[str, int, str | None, str | None]) -> pa.Table:
    columns = zip(*rows, strict=True)
    types = (pa.string(), pa.int64(), pa.string(), pa.string())
    names = ("split", "identity", "camera", "tracklet")
    return pa.table({name: pa.array(column, kind) for name, column, kind in zip(names, columns, types, strict=True)})


def together(groups: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups == group).tolist()) for group in set(groups.tolist()) - {-1}}


def test_people_of_train_are_groups_and_people_of_test_are_not():
    rows = rows_of(
        ("train", 1, "c1", "a"), ("train", 1, "c2", None), ("train", 2, "c1", "b"), ("train", NOBODY, "c1", "w"),
        ("train", NOBODY, "c1", "w"), ("val", 5, None, None), ("val", 5, None, None), ("test", 1, "c1", "a"),
        ("test", 1, "c1", "a"), ("test", 1, "c2", "a"), ("test", 1, None, "d"), ("test", NOBODY, None, "d"),
    )  # fmt: skip
    assert together(number_groups(rows, "identity")) == {frozenset(g) for g in ({0, 1}, {3, 4}, {7, 8}, {10, 11})}
    assert together(number_groups(rows, "tracklet")) == {frozenset(g) for g in ({3, 4}, {7, 8}, {10, 11})}


SOME_ROW = st.tuples(
    st.sampled_from(["train", "val", "test"]),
    st.integers(-1, 3),
    st.sampled_from(["c1", None]),
    st.sampled_from(["a", "b", None]),
)


@settings(max_examples=40)
@given(rows=st.lists(SOME_ROW, min_size=1, max_size=12), others=st.permutations(range(-1, 11)))
def test_whatever_identities_val_and_test_have_the_groups_are_the_same(rows, others):
    rows = [(s, i, c, f"{i}{t}" if t and s == "train" else t) for s, i, c, t in rows]  # a walk of train is one person's
    changed = [(s, i if s == "train" else others[i], c, t) for s, i, c, t in rows]
    for by in ("tracklet", "identity"):
        groups = number_groups(rows_of(*rows), by)
        assert number_groups(rows_of(*changed), by).tolist() == groups.tolist()
        for group in together(groups):
            assert len({rows[row][0] for row in group}) == 1
            assert len(group) > 1


def test_tracklets_that_are_numbered_anew_for_each_person_are_refused():
    rows = rows_of(("train", 1, "c1", "1"), ("train", 1, "c1", "1"), ("train", 2, "c1", "1"), ("test", 3, "c1", "1"))
    with pytest.raises(UserError, match=r"tracklet '1' of camera 'c1' has images of several people \(1, 2\)"):
        number_groups(rows, "tracklet")


def test_without_a_group_nothing_is_asked(tmp_path, prepared, without_ray):
    data = str(tmp_path / "data")
    ingest(data, IngestConfig(source=str(prepared.parent / "drawn"), limit=1))
    with pytest.raises(UserError, match=r"no two images in .*images are of one tracklet.*--columns tracklet=COLUMN"):
        dialogue(data, dataclasses.replace(ORACLE, agree="tracklet"))
    assert Store(data).manifest("dialogues") is None


@settings(max_examples=40)
@given(groups=st.lists(st.integers(-1, 4), min_size=1, max_size=30), size=st.integers(1, 6))
def test_every_dialogue_is_in_one_unit_with_its_whole_group(groups, size):
    keys = np.random.default_rng(len(groups)).permutation(len(groups)).astype(np.uint64)
    images = Images(Manifest("images", "i", 0, (), {}, {}, {}, ""), np.arange(len(keys)), np.sort(keys), np.sort(keys))
    of_image = np.array(groups)
    seen: list[int] = []
    for unit in plan_units(keys, images, of_image, size):
        rows, firsts = rows_in(unit["dialogues"]).tolist(), iter(rows_in(unit["images"]).tolist())
        seen += rows
        for length in unit["groups"]:
            group, rows = rows[:length], rows[length:]
            numbers_of = {of_image[int(keys[row])] for row in group}
            assert len(numbers_of) == 1
            if length > 1:
                assert next(firsts) == int(keys[group[0]])
                assert np.sum(of_image == numbers_of.pop()) == length
    assert sorted(seen) == list(range(len(keys)))


# --- the stage --------------------------------------------------------------------------------------------


def test_a_person_of_train_has_one_summary_and_in_test_each_tracklet(store):
    own = dialogue(store.uri, ORACLE)["dialogues"]
    alone = known(store)
    common = dialogue(store.uri, BY_IDENTITY)["dialogues"]
    assert common.made_from == {**own.made_from, "dialogues": own.version}
    agreed = known(store)
    for image_id, row in agreed.items():
        views = [
            other["image_id"]
            for other in agreed.values()
            if other["split"] == row["split"]
            and other["identity" if row["split"] == "train" else "tracklet"]
            == row["identity" if row["split"] == "train" else "tracklet"]
        ]
        assert (row["own_summary"] or row["summary"]) == alone[image_id]["summary"]
        if row["summary_of"] is None:  # its views said the same
            assert len({alone[view]["summary"] for view in views}) == 1
        else:
            assert set(row["summary_of"]) == set(views)
            assert {agreed[view]["summary"] for view in views} == {row["summary"]}
    assert sum(row["summary_of"] is not None for row in agreed.values()) > 12
    described, _ = find_dialogues(store, find_images(store, store.current("images")), common)
    assert {row.summary for row in list_images(store, described)} == {row["summary"] for row in agreed.values()}


def test_a_setting_that_is_off_leaves_versions_and_a_second_run_asks_nothing(store, monkeypatch):
    own = dialogue(store.uri, ORACLE)["dialogues"]
    assert "agree" not in own.config
    common = dialogue(store.uri, BY_IDENTITY)["dialogues"]
    monkeypatch.setattr(units, "_run_units", None)
    assert dialogue(store.uri, BY_IDENTITY)["dialogues"] == common
    assert store.current("dialogues") == common
    assert dialogue(store.uri, ORACLE)["dialogues"].version == own.version  # it is made current again
    assert dialogue(store.uri, BY_IDENTITY)["dialogues"].version == common.version


def test_other_groups_are_written_from_the_own_summaries_even_if_those_are_garbage(store):
    own = dialogue(store.uri, ORACLE)["dialogues"]
    alone = known(store)
    dialogue(store.uri, BY_IDENTITY)
    store.remove("dialogues", own.version)
    by_tracklet = dialogue(store.uri, dataclasses.replace(ORACLE, agree="tracklet"))["dialogues"]
    assert by_tracklet.made_from["dialogues"] == own.version
    for image_id, row in known(store).items():
        assert (row["own_summary"] or row["summary"]) == alone[image_id]["summary"]
        assert len(row["summary_of"] or "..") == 2


def test_a_killed_run_goes_on_with_the_units_that_are_left(store, monkeypatch):
    dialogue(store.uri, ORACLE)
    whole, done = units._run_units, []

    def once(store, plan, version, todo, workers):
        done.append(list(todo))
        whole(store, plan, version, todo[:1], workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(units, "_run_units", once)
    with pytest.raises(KeyboardInterrupt):
        dialogue(store.uri, BY_IDENTITY)
    monkeypatch.setattr(units, "_run_units", lambda *args: (done.append(list(args[3])), whole(*args)))
    table = dialogue(store.uri, BY_IDENTITY)["dialogues"]
    assert done == [[0, 1, 2, 3], [1, 2, 3]]
    assert table.rows == 20


def test_only_missing_writes_the_summaries_of_groups_that_grew_anew(store):
    few = dataclasses.replace(BY_IDENTITY, limit=6)
    first = dialogue(store.uri, few)["dialogues"]
    assert first.rows == 6
    with pytest.raises(UserError, match="agree: identity there, none here"):
        dialogue(store.uri, dataclasses.replace(ORACLE, only_missing=True))
    more = dataclasses.replace(BY_IDENTITY, only_missing=True)
    grown = dialogue(store.uri, more)["dialogues"]
    rows = known(store)
    assert grown.rows == 20
    assert max(len(row["summary_of"] or ()) for row in rows.values()) == 4
    assert {len({row["summary"] for row in rows.values() if row["identity"] == i}) for i in (0, 1, 2)} == {1}
    assert dialogue(store.uri, more)["dialogues"] == grown


def test_an_erased_image_leaves_the_summaries_that_were_written_from_its_own(store):
    first = dialogue(store.uri, BY_IDENTITY)["dialogues"]
    before = known(store)
    gone = next(i for i, row in before.items() if row["split"] == "train" and row["summary_of"])
    others = set(before[gone]["summary_of"]) - {gone}
    made_from = {"images": first.made_from["images"], "dialogues": first.version}
    gallery = Manifest("gallery", "g", 0, (), made_from, {}, {}, "")

    def unchanged() -> set[str]:
        """Images that `ceca index --only-missing` does not embed again."""
        described, _ = find_dialogues(store, find_images(store, store.current("images")), store.current("dialogues"))
        versions = {"images": described.table.version, "dialogues": store.current("dialogues").version}
        return set(spelled(_unchanged(store, gallery, described, versions)))

    assert unchanged() == before.keys()
    finish(store, hide(store, [gone], erase=True))
    after = known(store)
    assert gone not in after
    for image_id, row in after.items():
        was = before[image_id]
        if image_id in others:
            assert (row["summary"], row["own_summary"], row["summary_of"]) == (was["own_summary"], None, [])
        else:
            assert row == was
    assert store.current("dialogues").version == first.version
    assert unchanged() == after.keys() - others
    # The same command writes what is left of the group anew, and nothing of the erased image.
    again = dialogue(store.uri, BY_IDENTITY)["dialogues"]
    assert again.version != first.version
    assert all(set(known(store)[image_id]["summary_of"]) == others for image_id in others)
    assert unchanged() == after.keys() - others


def test_what_was_written_while_an_image_was_erased_is_not_published(store, monkeypatch):
    dialogue(store.uri, ORACLE)
    gone = next(iter(known(store)))
    run = units._run_units

    def erased_meanwhile(*arguments):
        run(*arguments)
        hide(store, [gone], erase=True)

    monkeypatch.setattr(units, "_run_units", erased_meanwhile)
    dialogue(store.uri, BY_IDENTITY)
    rows = known(store)
    assert "summary" not in rows[gone]  # it waits for its erasure in the table of images alone
    assert all(gone not in (row.get("summary_of") or ()) for row in rows.values())


def test_an_engine_that_refuses_a_group_leaves_its_images_their_own_summaries(store):
    own, common = itertools.count(), itertools.count()

    async def reply(body: dict[str, Any], request: Any) -> Any:
        if "pictures show the same person" not in body["messages"][-1]["content"][-1]["text"]:
            return completion(f"A person in {next(own)} red shirts.")
        return completion(("I'm sorry, but I can't help with that.", "N/A", "A man in red.")[next(common) % 3])

    server = ChatServer(reply)
    try:
        config = DialogueConfig(
            engine="openai",
            openai=OpenAIConfig(base_url=server.url, model="m"),
            questions=1,
            agree="tracklet",
            canary=False,
        )
        table = dialogue(store.uri, config)["dialogues"]
    finally:
        server.close()
    rejects, rows = store.read(store.current("rejects/agree")).to_pylist(), known(store)
    written = {tuple(row["summary_of"]): row["summary"] for row in rows.values() if row["summary_of"]}
    assert list(written.values()) == ["A man in red."] * 3
    assert table.notes["counts"]["common_summaries"] == 3
    assert sorted(reject["reason"] for reject in rejects) == ["empty_answer"] * 3 + ["refused"] * 4
    for reject in rejects:
        assert rows[reject["key"]]["own_summary"] is None
        assert rows[reject["key"]]["summary"].startswith("A person in")


@given(number=st.integers(1, 500))
@settings(max_examples=40)
def test_of_many_views_twelve_are_told_from_the_first_to_the_last(number):
    told = spread(number)
    assert len(told) == min(number, MOST_VIEWS) == len(set(told))
    assert (told[0], told[-1]) == (0, number - 1)
    assert max(np.diff(told), default=0) <= number / (MOST_VIEWS - 1) + 1


def test_the_request_holds_the_summaries_of_the_views():
    text = wording([View("A man in red."), View("A man with a bag.", "back")])
    assert text.startswith("2 pictures show the same person.")
    assert re.findall(r"^\d\. (.*)$", text, re.MULTILINE) == ["A man in red.", "A man with a bag."]
