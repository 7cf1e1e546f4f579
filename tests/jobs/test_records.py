"""Records on their way to a worker come back as they were."""

from __future__ import annotations

import json

from ceca.data.tables import ImageRow
from ceca.datasets.records import Record
from jobs.index import CopiedRows
from jobs.runtime.embed import CaptionRow
from jobs.runtime.records import cut, from_json, to_json


def test_records_come_back_from_json_as_they_were():
    for records in (
        [ImageRow("i", 7, "test", 1, 2, "a/b.png", "a man"), ImageRow("j", 8, "val", 0, 0, "c.png")],
        [CaptionRow("i-0", 7, "a man")],
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
