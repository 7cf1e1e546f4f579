"""Samples of WebDataset tar files: members that share a name up to the first dot of its last part."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from typing import Any

from ceca.data.store import Reject
from ceca.datasets.records import DatasetError
from ceca.datasets.rows import Row

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp")
SMALL = 2**20  # bytes of a text beside a picture; nothing larger is one


def tar_rows(fs: Any, path: str, name: str) -> Iterator[Row | Reject]:
    """Rows of a tar file, without the bytes of its pictures.

    The columns of a row are the endings of its members; the keys of a sample's JSON are columns too.

    Raises:
        DatasetError: it is no tar file, or it is compressed.
    """
    with fs.open(path, "rb", block_size=2**20) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for key, members in itertools.groupby(_members(archive), key=lambda member: _cut(member.name)[0]):
                    yield _row(archive, key, list(members), name)
        except tarfile.TarError as error:
            raise DatasetError(f"{name} is no plain tar file ({error}); unpack a compressed one first") from None


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
        if (member.isfile() or member.issym() or member.islnk()) and _cut(member.name)[1]:
            yield member


def _cut(name: str) -> tuple[str, str]:
    """A member's key and ending.

    >>> _cut("./a.b/0001.seg.PNG")
    ('a.b/0001', 'seg.png')
    """
    folder, slash, last = name.removeprefix("./").rpartition("/")
    key, _, ending = last.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


def _row(archive: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], name: str) -> Row | Reject:
    where = f"{name} {key}"
    values: dict[str, Any] = {}
    place, picture = None, ""
    for member in members:
        ending = _cut(member.name)[1]
        if not member.isfile():  # a link: its picture is in another place, if at all
            continue
        if ending in PICTURES:
            if place is None:
                place, picture = [name, member.offset_data, member.size], f"{name}/{key}.{ending}"
        elif ending in ("json", "txt", "cls", "id") and member.size <= SMALL:
            opened = archive.extractfile(member)
            text = opened.read().decode("utf-8", "surrogateescape") if opened is not None else ""
            if ending != "json":
                values[ending] = text.strip()
                continue
            try:
                said = json.loads(text)
            except (ValueError, RecursionError) as error:
                return Reject(where, "not_a_record", f"{where}.json is not valid JSON: {error}")
            values = {**said, **values} if isinstance(said, dict) else values
    if place is None and (links := [member.linkname for member in members if not member.isfile()]):
        detail = f"{where} is a link to {links[0]}; write the tar file with its pictures (tar --hard-dereference -h)"
        return Reject(where, "a_link", detail)
    if place is None:
        return Reject(where, "missing_file", f"{where} has no picture ({', '.join(PICTURES)})")
    return Row({**values, "image": picture}, where, place, ("image",))


def read_members(fs: Any, path: str, places: list[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes at these places (first byte, number of bytes) of a tar file."""
    with fs.open(path, "rb") as file:
        for first, size in places:
            file.seek(first)
            yield file.read(size)
