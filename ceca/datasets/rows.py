"""From a row of anybody's table to a record: which columns say what, and what a value means."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ceca.data.schema import NOBODY
from ceca.data.store import Reject
from ceca.datasets.records import GALLERY, DatasetError, Record, is_text, read_captions, read_identity, read_time

# What a column says → names under which it is found if nobody names it. `id` is not among them: in some tables it is
# a person, in others the row.
USUAL = {
    "image": (
        *("image", "img", "file", "file_name", "filename", "file_path", "filepath", "path", "img_path", "image_path"),
        *("jpg", "jpeg", "png", "webp", "bmp"),
    ),
    "identity": ("identity", "pid", "person_id", "person"),
    "text": ("text", "caption", "captions", "description", "txt"),
    "split": ("split", "subset"),
    "camera": ("camera", "cam", "camera_id", "camid", "cam_id"),
    "time": ("time", "timestamp", "datetime"),
    "tracklet": ("tracklet", "tracklet_id", "track_id"),
}
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "query", "gallery"), "test"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a source.

    Attributes:
        values: column → value.
        where: the row's place, for people, such as `people.csv line 7`.
        place: where the image's bytes are, if the source holds them itself (`Record.place`).
        inside: columns of images whose bytes are at that place; empty means all.
        split: the split that the name of the row's file says, if it says one.
    """

    values: Mapping[str, Any]
    where: str
    place: Sequence[Any] | None = None
    inside: Collection[str] = ()
    split: str | None = None


def parse_columns(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse `image=file text=first,second`: what a column says → its names.

    >>> parse_columns(["image=file", "text=first,second", "identity="])
    {'image': ('file',), 'text': ('first', 'second'), 'identity': ()}

    Raises:
        DatasetError: a word has no `=`, or says what no column can.
    """
    columns = {}
    for word in words:
        says, sign, names = word.partition("=")
        if not sign or says not in USUAL:
            raise DatasetError(f"--columns takes {'=…, '.join(USUAL)}=…, found {word!r}")
        columns[says] = tuple(name for name in names.split(",") if name)
        if len(columns[says]) > 1 and says != "text":
            raise DatasetError(f"--columns takes several names only of text, found {word!r}")
    return columns


def find_columns(there: Collection[str], given: Mapping[str, Sequence[str]], where: str) -> dict[str, tuple[str, ...]]:
    """Find what each column of a table says.

    Args:
        there: the table's columns.
        given: the columns that somebody named; an empty name turns one off.
        where: the table, for errors.

    Raises:
        DatasetError: a named column is not there, or no column has the images.
    """
    listed = ", ".join(map(str, there)) or "none"
    for says, names in given.items():
        if missing := [name for name in names if name not in there]:
            raise DatasetError(f"{where} has no column {', '.join(missing)} for {says}; its columns: {listed}")
    taken = {name for names in given.values() for name in names}
    found = {}
    for says, usual in USUAL.items():
        if says in given:
            found[says] = tuple(given[says])
            continue
        by_name = {name.lower(): name for name in reversed(list(there)) if name not in taken}
        found[says] = next(((by_name[name],) for name in usual if name in by_name), ())
    if not found["image"]:
        raise DatasetError(f"no column of {where} is known to hold images; name it: --columns image=COLUMN ({listed})")
    return found


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Makes records of rows.

    Attributes:
        columns: what a column says → its names (`find_columns`).
        root: folder that paths may begin with, as people write them.
        base_name: only the last part of a path counts.
        share: shares of train, val and test of images without a split; None makes them the gallery.
    """

    columns: Mapping[str, Sequence[str]]
    root: str = ""
    base_name: bool = False
    share: Sequence[float] | None = None

    def read(self, row: Row) -> Iterator[Record | Reject]:
        """Yield the row's record, and a reject for each value that it cannot have; or one reject, and no record."""
        self._check_texts(row)
        value = self._value(row, "image")
        path = self._path(value)
        if path is None:
            yield Reject(row.where, "bad_path", f"{row.where}: expected the path of an image, found {value!r:.100}")
            return
        value = self._value(row, "identity")
        identity = read_identity(value)
        if identity is None:
            yield Reject(path, "bad_identity", f"{row.where}: expected a person's number or name, found {value!r:.100}")
            return
        split = self._split(row, identity, path)
        if split is None:
            value = self._value(row, "split")
            yield Reject(path, "bad_split", f"{row.where}: expected train, val or test, found {value!r:.100}")
            return
        captions, unusable = read_captions(self._texts(row), path)
        yield from unusable
        named = {}
        for says in ("camera", "tracklet"):
            value = self._value(row, says)
            named[says] = None if value is None or value != value else str(value).strip() or None
        try:
            time = read_time(self._value(row, "time"))
        except ValueError:
            time, value = None, self._value(row, "time")
            yield Reject(path, "bad_time", f"{row.where}: expected a time as 2026-01-31T12:00, found {value!r:.100}")
        for says, name in named.items():
            if name is not None and not is_text(name):
                yield Reject(path, f"bad_{says}", f"{row.where}: expected a name, found {name!r:.100}")
                named[says] = None
        yield Record(path, identity, split, captions, named["camera"], time, self._place(row), named["tracklet"])

    def _check_texts(self, row: Row) -> None:
        """Check that no column but the images' holds bytes: they are taken for pictures, and their words for nothing.

        Raises:
            DatasetError: one does.
        """
        for says, names in self.columns.items() if row.inside else ():
            if wrong := [name for name in names if name in row.inside and says != "image"]:
                raise DatasetError(
                    f"{row.where}: column {wrong[0]} holds bytes and not {says}; write it as text, or name another: "
                    f"--columns {says}=COLUMN (nothing after the sign leaves it out)"
                )

    def _place(self, row: Row) -> Sequence[Any] | None:
        """Where the image's bytes are, and in which column, if they are not a file."""
        column = self.columns["image"][0]
        if row.place is None or (row.inside and column not in row.inside):
            return None
        return [*row.place, column] if row.inside else row.place

    def _value(self, row: Row, says: str) -> Any:
        names = self.columns[says]
        return row.values.get(names[0]) if names else None

    def _path(self, value: Any) -> str | None:
        """The path of an image below the source's folder; None if the value is no such path."""
        if isinstance(value, Mapping):  # how Hugging Face writes an image
            value = value.get("path")
        if not isinstance(value, str) or not is_text(value):
            return None
        path = value.strip().replace("\\", "/")
        if self.base_name:
            return path.rpartition("/")[2] or None
        if self.root and path.startswith(f"{self.root}/"):
            path = path[len(self.root) + 1 :]
        path = path.removeprefix("./")
        parts = path.split("/")  # not pathlib's, which keeps every name that it saw
        return None if parts[0] == "" or ".." in parts or parts[-1] in ("", ".") or "://" in path else path

    def _split(self, row: Row, identity: int, path: str) -> str | None:
        value = self._value(row, "split")
        given = "" if value is None or value != value else str(value).strip().lower()
        if given:
            return SPLIT_NAMES.get(given)
        return row.split or choose_split(identity, path, self.share)

    def _texts(self, row: Row) -> list[Any]:
        """The row's captions. An empty cell is none; an empty one in a list is a mistake that is told."""
        texts: list[Any] = []
        for name in self.columns["text"]:
            value = row.values.get(name)
            if isinstance(value, list | tuple):
                texts += value
            elif value is not None and value == value and value != "":
                texts.append(value)
        return texts


def choose_split(identity: int, path: str, share: Sequence[float] | None) -> str:
    """The split of an image whose source names none.

    The person decides, so all images of a person are together, and a person stays where they are if others are added.

    Args:
        identity: number of the person; the path decides for `NOBODY`.
        path: the image's path.
        share: shares of train, val and test, which large sets meet closely; None gives the gallery.
    """
    if share is None:
        return GALLERY
    key = path if identity == NOBODY else str(identity)
    at = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return "train" if at < share[0] else "val" if at < share[0] + share[1] else "test"
