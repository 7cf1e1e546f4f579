"""Published layouts: reading of records, rejects with their reasons, and comparison with the published statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceca.data.schema import image_id
from ceca.datasets.layouts import LAYOUTS, differences, read_annotations, read_records
from ceca.datasets.listing import Count, Listing
from ceca.datasets.records import DatasetError

CUHK = LAYOUTS["cuhk_pedes"]


def record(number: int = 0, **changes: Any) -> dict[str, Any]:
    whole = {"id": number, "split": "train", "captions": ["a man", "a boy"], "file_path": f"cam/{number}.jpg"}
    return {**whole, **changes}


@pytest.mark.parametrize(
    ("name", "path", "camera"),
    [
        ("cuhk_pedes", "CUHK01/0363004.png", None),
        ("icfg_pedes", "train/0000/0000_004_05_0303morning_1591_1_0.jpg", "05"),
        ("rstpreid", "0000_c14_0031.jpg", "14"),
    ],
)
def test_each_layout_is_found_by_its_annotation_file(tmp_path: Path, name: str, path: str, camera: str | None):
    layout = LAYOUTS[name]
    item = {"id": 5, "split": "test", "captions": [" a woman in red "], layout.image_key: path, "processed_tokens": []}
    (tmp_path / layout.annotation).write_text(json.dumps([item]))
    annotations = read_annotations(str(tmp_path))
    assert (annotations.layout.name, annotations.rejects, annotations.attributes) == (name, (), None)
    (kept,) = annotations.records
    assert (kept.source_path, kept.identity, kept.split, kept.camera) == (path, 5, "test", camera)
    assert kept.captions == ((0, "a woman in red"),)
    assert kept.image_id == image_id(path)


@pytest.mark.parametrize(
    ("item", "reason", "says"),
    [
        (["a list"], "not_a_record", "expected an object"),
        ({"id": 1, "split": "train", "file_path": "a.jpg"}, "missing_key", "no captions; the record has id, split"),
        (record(file_path="/etc/passwd"), "bad_path", "below imgs/"),
        (record(file_path="../secret.jpg"), "bad_path", "below imgs/"),
        (record(file_path=""), "bad_path", "found ''"),
        (record(id="7"), "bad_identity", "found '7'"),
        (record(id=True), "bad_identity", "found True"),
        (record(split="validation"), "bad_split", "expected one of train, val, test, found 'validation'"),
        (record(captions="a man"), "bad_captions", "expected a list"),
    ],
)
def test_an_unusable_record_is_a_reject_with_its_reason(item: Any, reason: str, says: str):
    records, rejects = read_records([record(1), item], CUHK)
    assert [kept.identity for kept in records] == [1]
    (reject,) = rejects
    assert reject.reason == reason
    assert says in reject.detail


def test_an_empty_caption_is_a_reject_and_the_others_keep_their_positions():
    records, rejects = read_records([record(captions=["", "a man", None, "a boy"])], CUHK)
    assert records[0].captions == ((1, "a man"), (3, "a boy"))
    assert [reject.key for reject in rejects] == [f"{records[0].image_id}-0", f"{records[0].image_id}-2"]
    assert {reject.reason for reject in rejects} == {"empty_caption"}


def test_the_first_of_duplicated_records_is_kept():
    records, rejects = read_records([record(1), record(2, file_path="cam/1.jpg")], CUHK)
    assert [kept.identity for kept in records] == [1]
    assert (rejects[0].key, rejects[0].reason) == ("cam/1.jpg", "duplicated_record")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["id", "split", "captions", "file_path"])


@given(st.lists(JSON | st.dictionaries(FIELDS, JSON) | st.just(record(3)), max_size=6))
def test_each_item_of_any_list_is_a_record_or_a_reject(items: list[Any]):
    records, rejects = read_records(items, CUHK)
    of_records = [reject for reject in rejects if reject.reason != "empty_caption"]
    assert len(records) + len(of_records) == len(items)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"id": 1', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b'{"images": []}', "expected a JSON list of records, found dict"),
        (b'[{"id": 1}, {"id": 2}]', r"none of its 2 records can be used; most common: 2 x missing_key"),
    ],
)
def test_an_unusable_annotation_file_is_one_error(tmp_path: Path, content: bytes, says: str):
    (tmp_path / CUHK.annotation).write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{CUHK.annotation}.*{says}"):
        read_annotations(str(tmp_path))


def test_a_folder_with_no_or_several_annotation_files_is_an_error_with_advice(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"looked for reid_raw.json, ICFG-PEDES.json, data_captions.json"):
        read_annotations(str(tmp_path))
    for name in ("cuhk_pedes", "rstpreid"):
        (tmp_path / LAYOUTS[name].annotation).write_text("[]")
    with pytest.raises(DatasetError, match="choose one with --layout"):
        read_annotations(str(tmp_path))


def test_differences_from_the_published_statistics_name_both_numbers():
    counts = dict(LAYOUTS["rstpreid"].statistics)
    assert differences(LAYOUTS["rstpreid"], counts) == []
    counts["val"] = Count(999, 200, 2_000)
    assert differences(LAYOUTS["rstpreid"], counts) == ["rstpreid val: 999 images here, 1,000 published"]
    del counts["test"]
    assert "rstpreid test: missing here" in differences(LAYOUTS["rstpreid"], counts)


def test_splits_are_counted_by_image_identity_and_caption():
    records, _ = read_records([record(n, id=n // 2, split="test" if n > 3 else "train") for n in range(5)], CUHK)
    assert Listing(records).counts() == {"train": Count(4, 2, 8), "test": Count(1, 1, 2)}


# --- what people are handed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["train\\0001.jpg", "imgs/train/0001.jpg", "./train/0001.jpg", "imgs\\train\\0001.jpg"]
)
def test_other_spellings_of_a_path_are_read(path: str):
    (kept,), rejects = read_records([record(file_path=path)], CUHK)
    assert (kept.source_path, rejects) == ("train/0001.jpg", [])


def test_a_file_with_a_record_per_caption_keeps_them_all():
    items = [record(captions=["a man"]), record(captions=["a boy"]), record(captions=["a man"]), record(1)]
    (first, second), (repeated,) = read_records(items, CUHK)
    assert first.captions == ((0, "a man"), (1, "a boy"))
    assert second.captions == ((0, "a man"), (1, "a boy"))
    assert repeated.reason == "duplicated_record"


def test_an_image_of_two_people_keeps_the_first_and_rejects_the_other():
    (kept,), (other,) = read_records([record(7, file_path="a.jpg"), record(8, file_path="a.jpg")], CUHK)
    assert kept.identity == 7
    assert other.reason == "duplicated_record"
    assert "another person" in other.detail


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (record(captions=["a man", "half \ud83d of a face"]), "bad_caption"),
        (record(captions=["a man", "a \0 in it"]), "bad_caption"),
        (record(file_path="half\ud83d.jpg"), "bad_path"),
        (record(file_path="nul\0.jpg"), "bad_path"),
        (record(file_path="imgs/"), "bad_path"),
        (record(file_path="..\\..\\secret.jpg"), "bad_path"),
        (record(file_path="imgs//etc/passwd"), "bad_path"),
        (record(id=10**23), "bad_identity"),
        (record(id=-(2**63) - 1), "bad_identity"),
        (record(split=["train"]), "bad_split"),
        ({"half\ud83d": 1}, "missing_key"),
    ],
)
def test_a_value_that_no_table_can_hold_is_one_reject(item: Any, reason: str):
    records, rejects = read_records([item, record(5)], CUHK)
    assert [reject.reason for reject in rejects] == [reason]
    assert records[-1].identity == 5
    for reject in rejects:
        (reject.key + reject.detail).encode()


def test_another_spelling_of_the_annotation_file_is_found(tmp_path: Path):
    item = {"id": 5, "split": "test", "captions": ["a man"], "file_path": "a.jpg"}
    (tmp_path / "ICFG_PEDES.json").write_text(json.dumps([item]))
    assert read_annotations(str(tmp_path)).layout.name == "icfg_pedes"


def test_a_layout_that_somebody_names_may_have_an_annotation_file_of_any_name(tmp_path: Path):
    item = {"id": 5, "split": "test", "captions": ["a man"], "file_path": "a.jpg"}
    (tmp_path / "mine.json").write_text(json.dumps([item]))
    assert read_annotations(str(tmp_path), "icfg_pedes").layout.annotation == "mine.json"
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"it has mine\.json, other\.json"):
        read_annotations(str(tmp_path), "icfg_pedes")


def test_without_an_annotation_file_the_error_says_what_is_there(tmp_path: Path):
    (tmp_path / "caption_all.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"looked for reid_raw\.json.*it has caption_all\.json"):
        read_annotations(str(tmp_path))
    with pytest.raises(DatasetError, match="it has no JSON file"):
        read_annotations(str(tmp_path / "nowhere"))


def test_json_that_is_nested_without_end_is_an_error_that_names_the_file(tmp_path: Path):
    (tmp_path / "reid_raw.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match=r"reid_raw\.json .*not valid JSON"):
        read_annotations(str(tmp_path))
