"""Sources: each kind with a small set in its form, odd ones included; what they say, and the bytes they hold."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import resource
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ceca.data.schema import NOBODY, image_id
from ceca.data.store import Reject
from ceca.datasets.listing import Count, Listing, read_record
from ceca.datasets.records import DatasetError, Record, read_identity, read_time
from ceca.datasets.rows import RowReader, choose_split, find_columns, parse_columns
from ceca.datasets.sources import open_source
from ceca.datasets.sources.tables import csv_rows, json_items


def picture(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 8), (number % 256, 0, 0)).save(content, "PNG")
    return content.getvalue()


def pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


def listed(source: Path, layout: str = "auto", **options: Any) -> tuple[dict[str, Record], list[Reject], list[Any]]:
    """Records by path, rejects, and what is read for each record."""
    opened = open_source(str(source), layout, **options)
    with Listing(opened.records()) as listing:
        records = [read_record(line) for unit in listing.cut(3) for line in unit]
        rejects = listing.rejects
    # A worker opens the source again, and does not list it.
    options.pop("share", None)
    again = open_source(str(source), opened.name, **options)
    contents = again.read(records)
    return {record.source_path: record for record in records}, rejects, contents


# --- a folder ---------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_of_any_names(tmp_path: Path):
    names = ("a.jpg", "deep/er/Zoë at the door.PNG", "deep/no ending", "a#1%20?.jpg", ".hidden/x.jpg", "deep/.y.jpg")
    pictures(tmp_path, *names)
    (tmp_path / "Thumbs.db").write_bytes(b"no picture")
    records, rejects, contents = listed(tmp_path)
    assert set(records) == {*names[:4], "Thumbs.db"}  # what is no picture is a reject when it is decoded
    assert {(r.identity, r.split, r.captions, r.camera) for r in records.values()} == {(NOBODY, "test", (), None)}
    assert contents[list(records).index("deep/no ending")] == picture(2)
    assert not rejects


def test_a_folder_without_anything_is_an_error(tmp_path: Path):
    with pytest.raises(DatasetError, match="nothing to read"):
        listed(tmp_path)
    with pytest.raises(DatasetError, match=r"no '.*nowhere'"):
        listed(tmp_path / "nowhere")
    (tmp_path / "notes.md").touch()
    with pytest.raises(DatasetError, match=r"is no source: expected a folder, \.csv"):
        listed(tmp_path / "notes.md")


def test_a_picture_that_changed_makes_another_version(tmp_path: Path):
    def digest() -> str:
        with Listing(open_source(str(tmp_path)).records()) as listing:
            return listing.digest

    pictures(tmp_path, "a.png")
    before = digest()
    assert digest() == before
    (tmp_path / "a.png").write_bytes(picture(0) + b"more")
    assert digest() != before


def test_what_may_be_annotations_is_never_left_aside_in_silence(tmp_path: Path):
    pictures(tmp_path, "imgs/a.jpg")
    (tmp_path / "caption_all.json").write_text('[{"file_path": "a.jpg", "captions": ["a man"], "id": 1}]')
    records, _, _ = listed(tmp_path)
    assert records["a.jpg"].captions == ((0, "a man"),)
    (tmp_path / "caption_all.json").write_text('[{"what": 1}]')
    with pytest.raises(DatasetError, match=r"no annotation file .*it has caption_all\.json"):
        listed(tmp_path)
    assert len(listed(tmp_path, "folder")[0]) == 2
    (tmp_path / "caption_all.json").rename(tmp_path / "notes.csv")
    with pytest.raises(DatasetError, match=r"has notes\.csv, and it is not clear .*--columns.*--layout folder"):
        listed(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "table", "parquet", "webdataset"])
def test_a_source_may_lie_elsewhere(kind: str):
    """By fsspec alone, as on an object store."""
    fs = fsspec.filesystem("memory")
    root = f"/{kind}"
    for number, name in enumerate(("b/2.png", "a.png", ".hidden/c.png")):
        fs.pipe(f"{root}/{name}", picture(number))
    source = f"memory:/{root}"
    if kind == "table":
        fs.pipe(f"{root}/t.csv.gz", gzip.compress(b"file,text\na.png,a man\nb/2.png,a boy\n"))
    elif kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.table({"image": [picture(1), picture(0)]}), sink)
        source = f"memory://{root}/t.parquet"
        fs.pipe(f"{root}/t.parquet", sink.getvalue())
    elif kind == "webdataset":
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as archive:
            for number in (1, 0):
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(picture(number))
                archive.addfile(member, io.BytesIO(picture(number)))
        source = f"memory://{root}/t.tar"
        fs.pipe(f"{root}/t.tar", sink.getvalue())
    opened = open_source(source)
    with Listing(opened.records()) as listing:
        records = [read_record(line) for unit in listing.cut(10) for line in unit]
    assert opened.read(records) == [picture(1), picture(0)]


# --- tables of text ---------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[list[Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_a_csv_file_with_a_column_map(tmp_path: Path):
    pictures(tmp_path, "p/1.png", "p/2.png", "p/3.png")
    header = ["n", "file", "pid", "caption", "set", "cam", "ts"]
    rows = [
        [1, "p/1.png", "ann", "a man, in red", "Training", "c1", "2026-01-31T12:00:00+01:00"],
        [2, "p\\2.png", "ann", "", "query", "", "1769860800"],
        [3, str(tmp_path / "p/3.png"), "", 'a "boy"', "", "c2", "noon"],
    ]
    table = write_csv(tmp_path / "people.csv", [header, *rows])
    columns = ["image=file", "identity=pid", "text=caption", "split=set", "camera=cam", "time=ts"]
    records, rejects, contents = listed(table, columns=columns)
    first, second, third = records.values()
    assert (first.split, first.camera, first.captions) == ("train", "c1", ((0, "a man, in red"),))
    assert first.time == "2026-01-31T11:00:00+00:00"
    assert (second.source_path, second.split, second.camera, second.captions) == ("p/2.png", "test", None, ())
    assert second.time == "2026-01-31T12:00:00+00:00"
    assert first.identity == second.identity > 2**52
    assert (third.source_path, third.identity, third.split, third.time) == ("p/3.png", NOBODY, "test", None)
    assert contents == [picture(0), picture(1), picture(2)]
    assert [(reject.key, reject.reason) for reject in rejects] == [("p/3.png", "bad_time")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_usual_names_of_columns_are_found_and_a_folder_with_a_table_is_one(tmp_path: Path, delimiter: str):
    pictures(tmp_path, "1.png", "2.png")
    rows = [["File_Name", "Text", "id"], ["1.png", "a man", 7], ["2.png", "a boy", 7]]
    write_csv(tmp_path / "metadata.csv", rows, delimiter)
    records, rejects, _ = listed(tmp_path)
    assert [(r.source_path, r.captions) for r in records.values()] == [
        ("1.png", ((0, "a man"),)),
        ("2.png", ((0, "a boy"),)),
    ]
    assert {r.identity for r in records.values()} == {NOBODY}  # `id` may be the row
    assert not rejects
    assert {r.identity for r in listed(tmp_path, columns=["identity=id"])[0].values()} == {7}


def test_each_table_of_a_folder_has_columns_of_its_own(tmp_path: Path):
    pictures(tmp_path, "1.png", "2.png", "3.png")
    write_csv(tmp_path / "train.csv", [["file", "pid"], ["1.png", 1]])
    write_csv(tmp_path / "test.csv", [["caption", "path"], ["a man", "2.png"]])
    (tmp_path / "more.jsonl").write_text('{"img": "3.png", "split": "val"}\n')
    records, rejects, _ = listed(tmp_path)
    assert {(r.source_path, r.split, r.identity, len(r.captions)) for r in records.values()} == {
        ("1.png", "train", 1, 0),
        ("2.png", "test", NOBODY, 1),
        ("3.png", "val", NOBODY, 0),
    }
    assert not rejects
    with pytest.raises(DatasetError, match="no column pid for identity"):
        listed(tmp_path, columns=["identity=pid"])


def test_odd_rows_of_a_table_are_rejects_and_the_others_stay(tmp_path: Path):
    content = (
        "\ufefffile,text,pid,split\n"
        "a.png,one,1,train\n\n"
        "b.png,one,2,sometimes\n"
        "c.png,one,3,train,more\n"
        "../d.png,one,4,train\n"
        "/etc/passwd,one,5,train\n"
        ",one,6,train\n"
        "s3://elsewhere/e.png,one,7,train\n"
        "f.png\n"
        "a.png,two,1,train\n"
        "a.png,three,9,train\n"
    )
    (tmp_path / "t.csv").write_bytes(content.encode() + b"g.png,\xff\xfe,1,train\nh\xff.png,x,1,train\n")
    records, rejects, contents = listed(tmp_path / "t.csv")
    assert list(records) == ["a.png", "f.png", "g.png"]
    assert records["a.png"].captions == ((0, "one"), (1, "two"))
    assert (records["f.png"].identity, records["f.png"].split) == (NOBODY, "test")
    reasons = [reject.reason for reject in rejects]
    assert reasons.count("bad_path") == 5
    assert {"bad_split", "bad_row", "bad_caption", "duplicated_record"} == set(reasons) - {"bad_path"}
    assert {content.reason for content in contents} == {"missing_file"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty: its first line must name the columns"),
        ("1.png,a man\n2.png,a boy\n", r"no column of .* is known to hold images; name it: --columns image=COLUMN"),
        ("file,file\n1.png,2.png\n", "names a column twice"),
        ("file,text\n", "nothing to read"),
    ],
)
def test_a_table_that_says_nothing_of_images_is_one_error(tmp_path: Path, content: str, says: str):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DatasetError, match=says):
        listed(tmp_path / "t.csv")


def test_a_column_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path):
    write_csv(tmp_path / "t.csv", [["file", "pid"], ["a.png", 1]])
    with pytest.raises(DatasetError, match=r"has no column person for identity; its columns: file, pid"):
        listed(tmp_path / "t.csv", columns=["identity=person"])
    with pytest.raises(DatasetError, match=r"--columns takes image=…, identity=….*found 'who=pid'"):
        listed(tmp_path / "t.csv", columns=["who=pid"])
    with pytest.raises(DatasetError, match="several names only of text"):
        parse_columns(["image=a,b"])
    assert listed(tmp_path / "t.csv", columns=["identity="])[0]["a.png"].identity == NOBODY


def test_json_lines_with_lists_of_captions_also_compressed(tmp_path: Path):
    rows = [
        {"path": "1.png", "captions": ["a man", ""], "person_id": 7, "split": "val"},
        {"path": "2.png", "captions": "a boy", "camera": 3},
        {"path": "2.png", "captions": "a child", "camera": 3},
        {"path": ["3.png"]},
        {"path": "4.png", "person_id": {"a": 1}},
    ]
    lines = "\n".join(map(json.dumps, rows)) + "\nno JSON\n[1]\n"
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "elsewhere").mkdir()
    pictures(tmp_path / "elsewhere", "1.png", "2.png")
    records, rejects, contents = listed(tmp_path / "rows.jsonl.gz", images=str(tmp_path / "elsewhere"))
    assert records["1.png"].captions == ((0, "a man"),)
    assert (records["1.png"].identity, records["1.png"].split) == (7, "val")
    assert (records["2.png"].captions, records["2.png"].camera) == (((0, "a boy"), (1, "a child")), "3")
    assert contents == [picture(0), picture(1)]
    assert sorted(reject.reason for reject in rejects) == [
        *("bad_identity", "bad_path", "empty_caption", "not_a_record", "not_a_record"),
    ]


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.floats()))))
def test_json_is_read_item_by_item_as_it_is_read_whole(items: list[Any]):
    text = json.dumps(items, ensure_ascii=False).encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
    read = [item for _, item in json_items(io.StringIO(text), "a.json")]
    assert str(read) == str(json.loads(text))
    whole = {str(number): item for number, item in enumerate(items)}
    assert str(dict(json_items(io.StringIO(json.dumps(whole, indent=1)), "a.json"))) == str(whole)


@pytest.mark.parametrize(
    "text", ["", "7", '[{"a": 1}', '[{"a": 1},]', '[{"a": 1} {"a": 2}]', "[1] 2", '{"a" 1}', "{1: 2}", "[" * 100_000]
)
def test_json_that_is_no_list_is_an_error_that_names_the_file(text: str):
    with pytest.raises(DatasetError, match=r"a\.json"):
        list(json_items(io.StringIO(text), "a.json"))


# --- tables that hold their pictures ----------------------------------------------------------------------


def test_parquet_with_paths_or_with_bytes(tmp_path: Path):
    pictures(tmp_path, "1.png", "2.png")
    plain = pa.table({"file": ["1.png", "2.png"], "pid": pa.array([1.0, None]), "text": [["a", "b"], None]})
    pq.write_table(plain, tmp_path / "plain.parquet")
    records, rejects, contents = listed(tmp_path / "plain.parquet")
    assert [(r.identity, len(r.captions)) for r in records.values()] == [(1, 2), (NOBODY, 0)]
    assert (contents, rejects) == ([picture(0), picture(1)], [])

    (tmp_path / "data").mkdir()
    for shard, split in enumerate(("train", "validation")):
        cells = [{"bytes": picture(10 * shard + n) if n != 4 else None, "path": f"{n}.png"} for n in range(6)]
        table = pa.table({"image": cells, "caption": [f"{split} {n}" for n in range(6)]})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet", row_group_size=4)
    pq.write_table(pa.table({"png": [picture(99)]}), tmp_path / "data" / "rest.parquet")
    (tmp_path / "plain.parquet").unlink()
    with pytest.raises(DatasetError, match="no column image for image; its columns: png"):
        listed(tmp_path, columns=["image=image"])
    records, rejects, contents = listed(tmp_path)
    counts = [record.split for record in records.values()]
    assert (counts.count("train"), counts.count("val")) == (6, 6)
    read = dict(zip(records, contents, strict=True))
    shard = "data/train-00000-of-00001.parquet"
    assert records[f"{shard}/0-0/0.png"].captions == ((0, "train 0"),)
    assert read[f"{shard}/0-3/3.png"] == picture(3)
    assert read[f"{shard}/1-1/5.png"] == picture(5)
    assert read[f"{shard}/1-0/4.png"].reason == "missing_file"
    assert (read["data/rest.parquet/0-0"], len(contents), rejects) == (picture(99), 13, [])
    records, _, contents = listed(tmp_path / "data" / "rest.parquet")
    assert contents == [picture(99)]


def test_a_dataset_that_hugging_face_saved(tmp_path: Path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    info = {"features": {"image": {"_type": "Image"}, "camera": {"_type": "ClassLabel", "names": ["gate", "hall"]}}}
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        cells = pa.array([{"bytes": picture(n), "path": None} for n in range(5)], kind)
        table = pa.table({"image": cells, "pid": [1, 1, 2, 2, None], "camera": [0, 1, 0, 1, -1]})
        file = str(tmp_path / split / "data-00000-of-00001.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        (tmp_path / split / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
        (tmp_path / split / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    records, rejects, contents = listed(tmp_path)
    assert [record.split for record in records.values()] == ["train"] * 5 + ["test"] * 5
    assert [record.camera for record in records.values()][:5] == ["gate", "hall", "gate", "hall", "-1"]
    assert [record.identity for record in records.values()][:5] == [1, 1, 2, 2, NOBODY]
    assert contents == [picture(n) for n in range(5)] * 2
    assert not rejects
    assert {record.split for record in listed(tmp_path / "train")[0].values()} == {"test"}  # one part, no split
    (tmp_path / "train" / "state.json").write_text('{"_data_files": [], "_indices_files": [{}]}')
    with pytest.raises(DatasetError, match="flatten_indices"):
        listed(tmp_path)


def test_webdataset_tar_files(tmp_path: Path):
    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    for shard in range(2):
        with tarfile.open(tmp_path / f"people-{shard:06}.tar", "w") as archive:
            for number in range(4):
                add(archive, f"./{number:04}.PNG", picture(10 * shard + number))
                add(archive, f"./{number:04}.txt", f" person {number}\n".encode())
                if number:
                    add(archive, f"./{number:04}.json", json.dumps({"pid": number, "split": "val"}).encode())
                add(archive, f"./{number:04}.seg.png", b"no picture of its own")
            add(archive, "0009.txt", b"nobody")
            add(archive, "0010.json", b"{")
    records, rejects, contents = listed(tmp_path)
    assert len(records) == 8
    first, second = list(records.values())[:2]
    assert (first.source_path, first.identity, first.split) == ("people-000000.tar/0000.png", NOBODY, "test")
    assert first.captions == ((0, "person 0"),)
    assert (second.identity, second.split) == (1, "val")
    assert contents == [picture(10 * shard + number) for shard in range(2) for number in range(4)]
    assert sorted(reject.reason for reject in rejects) == ["missing_file"] * 2 + ["not_a_record"] * 2
    pictures(tmp_path / "loose", "a.jpg")
    with pytest.raises(DatasetError, match="tar files and pictures; choose"):
        listed(tmp_path)
    assert len(listed(tmp_path, "webdataset")[0]) == 8
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz"):
        pass
    with pytest.raises(DatasetError, match="no plain tar file"):
        listed(tmp_path / "packed.tar.gz")


# --- what a value means -----------------------------------------------------------------------------------


def test_nobody_named_is_never_one_person(tmp_path: Path):
    for empty in (None, "", " ", float("nan"), "NaN", "null", "None", "-1", -1):
        assert read_identity(empty) == NOBODY
    assert [read_identity(one) for one in (0, "0", "7", "007", 7.0, "7.0", -5)] == [0, 0, 7, 7, 7, 7, -5]
    assert [read_identity(wrong) for wrong in (True, 1.5, [1], 2**63, b"a", "half \ud83d")] == [None] * 6
    named = {read_identity(f"person {number}") for number in range(1000)}
    assert len(named) == 1000
    assert all(number is not None and 2**52 <= number < 2**53 for number in named)


def test_times_are_in_utc():
    assert read_time("2026-01-31") == "2026-01-31T00:00:00+00:00"
    assert read_time("2026-01-31T12:00:00Z") == read_time(1769860800) == read_time(1769860800000)
    assert read_time("") is read_time(None) is read_time(float("nan")) is None
    for wrong in ("noon", [], 1e300, True):
        with pytest.raises(ValueError):  # noqa: PT011
            read_time(wrong)


def test_shares_of_splits_are_by_person_and_stay_when_others_come():
    share = (0.8, 0.1, 0.1)
    chosen = [choose_split(number, f"{number}.png", share) for number in range(5000)]
    assert {split: round(chosen.count(split) / 5000, 1) for split in ("train", "val", "test")} == {
        "train": 0.8, "val": 0.1, "test": 0.1,
    }  # fmt: skip
    assert choose_split(7, "a", share) == choose_split(7, "b", share)
    alone = {choose_split(NOBODY, f"{number}.png", share) for number in range(100)}
    assert alone == {"train", "val", "test"}
    assert choose_split(7, "a", None) == "test"


def test_a_listing_counts_as_the_published_figures_do():
    records = [Record(f"{n}.png", n // 2 if n < 4 else NOBODY, "train", ()) for n in range(6)]
    with Listing(records) as listing:
        assert listing.counts() == {"train": Count(6, 4, 0)}  # each of nobody's images is a person
        known = [image_id("0.png"), "0000000000000000"]
        assert listing.lacks(known) == ["0000000000000000"]
        listing.leave_out(known)
        assert len(listing) == 5
        assert [len(unit) for unit in listing.cut(2, limit=3)] == [2, 1]


# --- any length -------------------------------------------------------------------------------------------


class Endless(io.TextIOBase):
    """A manifest that is made while it is read."""

    def __init__(self, rows: int):
        self.lines: Iterator[str] = (
            f"{n % 1000:03}/{n:09}.jpg,{n // 4},a person with the number {n}\n" for n in range(rows)
        )

    def readline(self, _: int = -1) -> str:  # type: ignore[override]
        return next(self.lines, "")

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return self.lines


def list_many(rows: int) -> int:
    """Records in the units of a listing of so many rows."""
    reader = RowReader(find_columns(["file", "pid", "text"], {}, "a.csv"))
    file = Endless(rows)
    file.lines = itertools.chain(["file,pid,text\n"], file.lines)
    with Listing(record for row in csv_rows(file, "a.csv") for record in reader.read(row)) as listing:
        return sum(len(unit) for unit in listing.cut(64))


def traced(rows: int) -> int:
    """Bytes of Python objects, at the most, while so many rows are listed."""
    tracemalloc.start()
    try:
        assert list_many(rows) == rows
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_manifest():
    assert traced(2_000) < traced(500) + 300_000  # 1,500 records are some megabytes


@pytest.mark.slow
@pytest.mark.long
def test_a_manifest_of_a_million_rows_takes_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list_many(1_000_000) == 1_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # kilobytes
