"""Tables that are not as they should be: one error that names the file, or a reject for each row."""

from __future__ import annotations

import datetime
import gzip
import io
import tarfile
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ceca.datasets.records import DatasetError, read_identity
from tests.ceca.datasets.test_sources import listed, picture, pictures


@pytest.mark.parametrize(
    "content", [gzip.compress(b"file\n1.png\n" * 1000)[:-20], b"file\n1.png\n"], ids=["cut", "not packed"]
)
def test_a_packed_table_that_is_damaged_is_one_error(tmp_path: Path, content: bytes):
    (tmp_path / "t.csv.gz").write_bytes(content)
    with pytest.raises(DatasetError, match=r"t\.csv\.gz cannot be unpacked \(\w+: .*\); download it again"):
        listed(tmp_path / "t.csv.gz")


@pytest.mark.parametrize("packed", ["bz2", "xz", "zip"])
def test_other_packed_tables_too(tmp_path: Path, packed: str):
    (tmp_path / f"t.csv.{packed}").write_bytes(b"this is not packed at all, and long enough to be looked at")
    with pytest.raises(DatasetError, match="cannot be unpacked"):
        listed(tmp_path / f"t.csv.{packed}")


def test_a_table_in_utf_16_says_so(tmp_path: Path):
    (tmp_path / "t.csv").write_text("file,text\n1.png,a man\n", encoding="utf-16")
    with pytest.raises(DatasetError, match=r"t\.csv is UTF-16; save it as UTF-8"):
        listed(tmp_path / "t.csv")


def test_a_column_of_words_that_holds_bytes_is_an_error_that_names_it(tmp_path: Path):
    pictures(tmp_path, "1.png")
    pq.write_table(pa.table({"file": ["1.png"], "text": [b"a man"]}), tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match="column text holds bytes and not text; write it as text"):
        listed(tmp_path / "t.parquet")
    records, _, _ = listed(tmp_path / "t.parquet", columns=("text=",))
    assert records["1.png"].captions == ()


def test_one_cell_that_cannot_be_read_is_one_reject(tmp_path: Path):
    pictures(tmp_path, *(f"{number}.png" for number in range(5)))
    words = pa.array([b"a man", b"\xff\xfe", b"a boy"]).cast(pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, words.buffers())
    times = pa.array([0, 0, 0, 2**62, 0], pa.timestamp("us"))
    pq.write_table(pa.table({"file": [f"{n}.png" for n in range(3)], "text": texts}), tmp_path / "words.parquet")
    pq.write_table(pa.table({"file": [f"{n}.png" for n in range(5)], "time": times}), tmp_path / "times.parquet")
    for name, wrong in (("words", 1), ("times", 3)):
        records, rejects, _ = listed(tmp_path / f"{name}.parquet")
        assert f"{wrong}.png" not in records
        assert len(records) == (2 if name == "words" else 4)
        assert [(reject.key, reject.reason) for reject in rejects] == [(f"{name}.parquet row 0-{wrong}", "bad_row")]


def test_numbers_that_a_table_keeps_otherwise_are_persons_and_times(tmp_path: Path):
    pictures(tmp_path, "1.png")
    day = datetime.date(2026, 1, 31)
    pq.write_table(pa.table({"file": ["1.png"], "pid": [Decimal("7")], "time": [day]}), tmp_path / "t.parquet")
    records, rejects, _ = listed(tmp_path / "t.parquet")
    assert not rejects
    assert (records["1.png"].identity, records["1.png"].time) == (7, "2026-01-31T00:00:00+00:00")
    assert read_identity(Decimal("7.5")) is None
    assert read_identity(Decimal("Infinity")) is None


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_number_of_thousands_of_digits_spoils_its_row_alone(tmp_path: Path, form: str):
    pictures(tmp_path, "1.png", "2.png")
    rows = [f'{{"file": "{n}.png", "pid": {"7" * digits}}}' for n, digits in ((1, 5000), (2, 1))]
    text = f"[{', '.join(rows)}]" if form == "json" else "\n".join(rows)
    (tmp_path / f"t.{form}").write_text(text)
    records, rejects, _ = listed(tmp_path / f"t.{form}")
    assert set(records) == {"2.png"}
    assert len(rejects) == 1


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_quotation_mark_that_is_never_closed_is_told_with_its_lines(tmp_path: Path, end: str):
    pictures(tmp_path, "1.png", "2.png", "3.png", "4.png")
    rows = ['1.png,"a man\nin red"', '2.png,"a boy', "3.png,a girl", "4.png,a man"]
    (tmp_path / "t.csv").write_text("file,text\n" + "\n".join(rows) + end)
    records, rejects, _ = listed(tmp_path / "t.csv")
    assert records["1.png"].captions == ((0, "a man\nin red"),)
    assert set(records) == {"1.png"}
    (reject,) = rejects
    assert reject.reason == "open_quote"
    assert "opened in line 4 and is never closed, so lines 4 to 6 are one row" in reject.detail


@pytest.mark.parametrize("name", ["reid_raw.json", "people.csv", "people.parquet"])
def test_a_table_that_is_a_link_out_of_its_folder_is_refused_without_its_text(tmp_path: Path, name: str):
    (tmp_path / "secret").write_text('["SECRET"]')
    source = pictures(tmp_path / "source", "1.png")
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(DatasetError, match=r"is a link to .*secret, out of its folder; copy the file") as error:
        listed(source, "table" if name.startswith("people") else "auto")
    assert "SECRET" not in str(error.value)


def test_a_link_that_somebody_names_is_read(tmp_path: Path):
    pictures(tmp_path / "source", "1.png")
    (tmp_path / "real.csv").write_text("file,text\n1.png,a man\n")
    (tmp_path / "source" / "people.csv").symlink_to(tmp_path / "real.csv")
    assert set(listed(tmp_path / "source" / "people.csv")[0]) == {"1.png"}


def test_a_copy_in_the_hubs_cache_has_its_files_beside_it(tmp_path: Path):
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "0f1e"
    pictures(blobs, "e3b0")
    (blobs / "beef").write_text("file,text\n1.png,a man\n")
    snapshot.mkdir(parents=True)
    (snapshot / "1.png").symlink_to("../../blobs/e3b0")
    (snapshot / "people.csv").symlink_to("../../blobs/beef")
    records, rejects, contents = listed(snapshot, "table")
    assert not rejects
    assert records["1.png"].captions == ((0, "a man"),)
    assert contents == [(blobs / "e3b0").read_bytes()]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_a_link_in_a_tar_file_is_a_reject(tmp_path: Path, kind: bytes):
    with tarfile.open(tmp_path / "people.tar", "w") as archive:
        for name, content in (("1.png", picture(1)), ("1.txt", b"a man"), ("2.txt", b"a boy")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = kind, "1.png"
        archive.addfile(link)
    records, rejects, _ = listed(tmp_path / "people.tar")
    assert [record.captions for record in records.values()] == [((0, "a man"),)]
    assert [(reject.key, reject.reason) for reject in rejects] == [("people.tar 2", "a_link")]
