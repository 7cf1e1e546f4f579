"""Lance datasets: each row keeps the picture of the version that was listed."""

from __future__ import annotations

from pathlib import Path

import lance
import pyarrow as pa
import pytest

from ceca.data.schema import NOBODY
from ceca.data.store import Reject
from ceca.datasets.records import DatasetError
from ceca.datasets.sources import open_source
from tests.ceca.datasets.test_sources import listed, picture


def test_lance_datasets(tmp_path: Path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": picture(n), "path": f"cam/{n}.png"} if n != 4 else None for n in range(5)], kind)
    people = pa.table({"image": cells, "pid": [1, 1, 2, 2, None], "text": [f"person {n}" for n in range(5)]})
    for split in ("train", "test"):
        lance.write_dataset(people, tmp_path / f"{split}.lance", max_rows_per_file=2)
    records, rejects, contents = listed(tmp_path)
    assert [record.split for record in records.values()] == ["test"] * 5 + ["train"] * 5
    assert [record.identity for record in records.values()][:5] == [1, 1, 2, 2, NOBODY]
    assert next(iter(records)) == "test.lance/0/0.png"
    assert (contents[:4], contents[4].reason, rejects) == ([picture(n) for n in range(4)], "missing_file", [])

    source = open_source(str(tmp_path / "test.lance"))  # one dataset, without a table of pictures beside it
    before = [record for record in source.records() if not isinstance(record, Reject)]
    other = people.slice(0, 4).set_column(0, "image", pa.array([{"bytes": picture(n + 9)} for n in range(4)], kind))
    lance.write_dataset(other, tmp_path / "test.lance", mode="overwrite")
    assert source.read(before)[:4] == [picture(n) for n in range(4)]  # of the version that was listed
    assert listed(tmp_path / "test.lance")[2] == [picture(n + 9) for n in range(4)]

    next((tmp_path / "test.lance" / "data").iterdir()).write_bytes(b"no Lance file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="is no Lance dataset, and holds none"):
        open_source(str(tmp_path / "empty"), "lance")
