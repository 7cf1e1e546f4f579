"""Published layouts: reading of records, rejects with their reasons, and comparison with the published statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceca.data.schema import image_id
from ceca.datasets.layouts import (
    LAYOUTS,
    Count,
    DatasetError,
    count_splits,
    differences,
    read_annotations,
    read_records,
)

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
    assert count_splits(records) == {"train": Count(4, 2, 8), "test": Count(1, 1, 2)}
