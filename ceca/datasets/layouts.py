"""Readers of the published layouts: an annotation file and the folder imgs/ beside it.

The annotation file is a JSON list of records {id, split, captions, <image key>: path below imgs/}; other keys
are ignored. One unusable record is a reject, an unusable file is an error.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from ceca.data.schema import caption_id
from ceca.data.schema import image_id as image_id_of
from ceca.data.store import Reject, filesystem
from ceca.errors import UserError

SPLITS = ("train", "val", "test")
ATTRIBUTES_FILE = "attributes.json"  # drawn pedestrians carry their ground truth here


class DatasetError(UserError):
    """The folder is not a dataset in a published layout."""


@dataclasses.dataclass(frozen=True)
class Count:
    """Size of a split; None where the publication gives no figure."""

    images: int
    identities: int
    captions: int | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a benchmark is laid out on disk, and how large it is (method: Data)."""

    name: str
    annotation: str
    image_key: str
    statistics: dict[str, Count]
    camera: str | None = None  # pattern of the camera's number in a file name


LAYOUTS = {
    "cuhk_pedes": Layout(
        "cuhk_pedes",
        "reid_raw.json",
        "file_path",
        {"train": Count(34_054, 11_003, 68_126), "val": Count(3_078, 1_000, 6_158), "test": Count(3_074, 1_000, 6_156)},
    ),
    "icfg_pedes": Layout(
        "icfg_pedes",
        "ICFG-PEDES.json",
        "file_path",
        {"train": Count(34_674, 3_102, 34_674), "test": Count(19_848, 1_000, 19_848)},
        camera=r"^\d+_\d+_(\d+)_",
    ),
    "rstpreid": Layout(
        "rstpreid",
        "data_captions.json",
        "img_path",
        {"train": Count(18_505, 3_701, 37_010), "val": Count(1_000, 200, 2_000), "test": Count(1_000, 200, 2_000)},
        camera=r"_c(\d+)_",
    ),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One image of the annotation file with its captions."""

    source_path: str
    identity: int
    split: str
    captions: tuple[tuple[int, str], ...]  # (position in the record, sentence)
    camera: str | None = None

    @property
    def image_id(self) -> str:
        return image_id_of(self.source_path)


@dataclasses.dataclass(frozen=True)
class Annotations:
    """A dataset's annotation file, read: usable records, rejects, and what it was."""

    layout: Layout
    records: tuple[Record, ...]
    rejects: tuple[Reject, ...]
    content: bytes
    attributes: dict[str, Any] | None  # of drawn pedestrians: {"vocabulary": …, "images": […]}


def read_annotations(source: str, layout: str = "auto") -> Annotations:
    """Read the annotation file below `source` (folder or URI).

    Raises:
        DatasetError: no annotation file, or not a JSON list: what was found, where, and what is expected.
    """
    fs, root = filesystem(source)
    chosen = _find_layout(fs, root, source, layout)
    path = f"{root}/{chosen.annotation}"
    content = fs.cat_file(path)
    found = _parse(content, path)
    if not isinstance(found, list):
        raise DatasetError(f"{path}: expected a JSON list of records, found {type(found).__name__}")
    records, rejects = read_records(found, chosen)
    if not records:
        reasons = Counter(f"{reject.reason} ({reject.detail})" for reject in rejects).most_common(3)
        raise DatasetError(
            f"{path}: none of its {len(found)} records can be used; most common: "
            + "; ".join(f"{count} x {reason}" for reason, count in reasons)
        )
    return Annotations(chosen, tuple(records), tuple(rejects), content, read_attributes(fs, root))


def read_attributes(fs: Any, root: str) -> dict[str, Any] | None:
    """The ground truth of drawn pedestrians, {"vocabulary": …, "images": […]}; None for any other dataset."""
    path = f"{root}/{ATTRIBUTES_FILE}"
    return _parse(fs.cat_file(path), path) if fs.exists(path) else None


def _find_layout(fs: Any, root: str, source: str, layout: str) -> Layout:
    candidates = list(LAYOUTS.values()) if layout == "auto" else [LAYOUTS[layout]]
    present = [candidate for candidate in candidates if fs.exists(f"{root}/{candidate.annotation}")]
    if len(present) == 1:
        return present[0]
    names = ", ".join(candidate.annotation for candidate in candidates)
    if not present:
        raise DatasetError(
            f"no annotation file in {source!r}: looked for {names}; pass --source with the folder of one"
        )
    raise DatasetError(
        f"{source!r} holds several annotation files ({', '.join(found.annotation for found in present)}); "
        "choose one with --layout"
    )


def _parse(content: bytes, path: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise DatasetError(
            f"{path} ({len(content)} bytes) is not valid JSON: {error}; copy the file again from its publisher"
        ) from None


def read_records(found: Sequence[Any], layout: Layout) -> tuple[list[Record], list[Reject]]:
    """Sort an annotation list into usable records and rejects. Captions are checked one by one.

    An image whose captions are all unusable stays: it can still be found in a gallery.
    """
    records: dict[str, Record] = {}
    rejects: list[Reject] = []
    for position, item in enumerate(found):
        where = f"record {position}"
        problem = _problem(item, layout)
        if problem is not None:
            key = item.get(layout.image_key) if isinstance(item, dict) else None
            rejects.append(Reject(key if isinstance(key, str) and key else where, *problem))
            continue
        path = item[layout.image_key]
        if path in records:
            rejects.append(
                Reject(path, "duplicated_record", f"{where} names an image that came before; first one kept")
            )
            continue
        captions = []
        for number, text in enumerate(item["captions"]):
            if isinstance(text, str) and text.strip():
                captions.append((number, text.strip()))
            else:
                key = caption_id(image_id_of(path), number)
                rejects.append(Reject(key, "empty_caption", f"caption {number} of {path} is {text!r}"))
        camera = re.search(layout.camera, PurePosixPath(path).name) if layout.camera else None
        records[path] = Record(path, item["id"], item["split"], tuple(captions), camera[1] if camera else None)
    return list(records.values()), rejects


def _problem(item: Any, layout: Layout) -> tuple[str, str] | None:
    """Why a record cannot be used: (reason, detail), or None."""
    if not isinstance(item, dict):
        return "not_a_record", f"expected an object, found {item!r:.100}"
    needed = ("id", "split", "captions", layout.image_key)
    missing = [key for key in needed if key not in item]
    if missing:
        return "missing_key", f"no {', '.join(missing)}; the record has {', '.join(map(str, item))}"
    path, identity, split, captions = (item[key] for key in (layout.image_key, "id", "split", "captions"))
    if not isinstance(path, str) or not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
        return "bad_path", f"expected a path below imgs/, found {path!r:.100}"
    if isinstance(identity, bool) or not isinstance(identity, int):
        return "bad_identity", f"expected a whole number under id, found {identity!r:.100}"
    if split not in SPLITS:
        return "bad_split", f"expected one of {', '.join(SPLITS)}, found {split!r:.100}"
    if not isinstance(captions, list):
        return "bad_captions", f"expected a list of sentences, found {captions!r:.100}"
    return None


def count_splits(records: Sequence[Record]) -> dict[str, Count]:
    """Images, identities and captions of each split."""
    counts = {}
    for split in SPLITS:
        chosen = [record for record in records if record.split == split]
        if chosen:
            identities = len({record.identity for record in chosen})
            counts[split] = Count(len(chosen), identities, sum(len(record.captions) for record in chosen))
    return counts


def differences(layout: Layout, counts: dict[str, Count]) -> list[str]:
    """Where the counts differ from the published ones, a sentence each."""
    found = []
    for split in sorted(layout.statistics.keys() | counts.keys()):
        published, here = layout.statistics.get(split), counts.get(split)
        if published is None or here is None:
            found.append(f"{layout.name} {split}: {'not a published split' if published is None else 'missing here'}")
            continue
        for what in ("images", "identities", "captions"):
            expected, actual = getattr(published, what), getattr(here, what)
            if expected is not None and expected != actual:
                found.append(f"{layout.name} {split}: {actual:,} {what} here, {expected:,} published")
    return found
