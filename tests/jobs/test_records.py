"""Records on their way to a worker come back as they were."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceca.data.tables import ImageRow
from ceca.datasets.records import Record
from jobs.index import CopiedRows
from jobs.runtime.records import Joined, Units, cut, from_json, ranges, rows_in, to_json


def test_records_come_back_from_json_as_they_were():
    for records in (
        [ImageRow("i", 7, "test", 1, 2, "a/b.png", "a man"), ImageRow("j", 8, "val", 0, 0, "c.png")],
        [CopiedRows(3, [0, 2])],
    ):
        assert from_json(type(records[0]), json.loads(json.dumps(to_json(records)))) == records


def test_a_tuple_inside_a_record_comes_back_as_a_list():
    (record,) = from_json(Record, json.loads(json.dumps(to_json([Record("a.png", 1, "train", ((0, "a man"),))]))))
    assert (record.source_path, record.identity, record.split, record.camera) == ("a.png", 1, "train", None)
    assert [tuple(caption) for caption in record.captions] == [(0, "a man")]


def test_a_sequence_is_cut_into_lists_of_at_most_the_size():
    assert cut(tuple(range(5)), 2) == [[0, 1], [2, 3], [4]]
    assert cut((), 2) == []


@given(st.lists(st.integers(0, 20)))
def test_rows_come_back_from_their_ranges_in_their_order(rows):
    spans = json.loads(json.dumps(ranges(np.array(rows, np.int64))))
    assert rows_in(spans).tolist() == rows


def test_consecutive_rows_are_one_range():
    assert ranges(np.arange(5, 2048)) == [[5, 2048]]
    assert ranges(np.arange(0)) == []


def test_units_are_cut_from_columns_when_they_are_asked_for():
    units = Units(2, images=np.array([0, 1, 2, 5, 6]), dialogues=np.array([4, 3, 2, 1, 0]), queries=None)
    assert (len(units), units.sizes) == (3, [2, 2, 1])
    assert units[1] == {"images": [[2, 3], [5, 6]], "dialogues": [[2, 3], [1, 2]]}
    assert list(units)[-1] == units[-1] == {"images": [[6, 7]], "dialogues": [[0, 1]]}
    assert units[1:] == [units[1], units[2]]
    with pytest.raises(IndexError):
        units[3]
    assert (len(Units(2, images=np.arange(0))), list(Units(2, images=np.arange(0)))) == (0, [])


def test_joined_sequences_are_one():
    joined = Joined(["a"], [], Units(1, rows=np.arange(2)))
    assert (len(joined), list(joined)) == (3, ["a", {"rows": [[0, 1]]}, {"rows": [[1, 2]]}])
    assert joined[1:] == list(joined)[1:]
    with pytest.raises(IndexError):
        joined[3]
