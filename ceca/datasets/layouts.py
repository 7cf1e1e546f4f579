"""Published benchmark layouts: an annotation file beside the folder imgs/. The reader and the drawer share them.

The annotation file is a JSON list of records {id, split, captions, <image key>: path below imgs/}. Other keys are
ignored. An unusable record becomes a reject; an unusable file is an error.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ceca.data.store import Reject, filesystem
from ceca.datasets.links import require_inside
from ceca.datasets.listing import Count
from ceca.datasets.records import SPLITS, DatasetError, Record, is_text, parse_int, read_captions

ATTRIBUTES_FILE = "attributes.json"  # ground truth of drawn pedestrians; other datasets have none


@dataclasses.dataclass(frozen=True)
class Layout:
    """File layout and published size of a benchmark (method: Data).

    Attributes:
        name: the layout's key in LAYOUTS.
        annotation: name of the annotation file.
        image_key: key of the image path in a record.
        first_identity: smallest identity number.
        captions_per_image: usual number of captions in a record.
        statistics: published size of each split. A split that the benchmark does not have is missing.
        camera: regular expression; its first group is the camera number in a file name.
    """

    name: str
    annotation: str
    image_key: str
    first_identity: int
    captions_per_image: int
    statistics: Mapping[str, Count]
    camera: str | None = None


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="cuhk_pedes",
            annotation="reid_raw.json",
            image_key="file_path",
            first_identity=1,
            captions_per_image=2,
            statistics={
                "train": Count(34_054, 11_003, 68_126),
                "val": Count(3_078, 1_000, 6_158),
                "test": Count(3_074, 1_000, 6_156),
            },
        ),
        Layout(
            name="icfg_pedes",
            annotation="ICFG-PEDES.json",
            image_key="file_path",
            first_identity=0,
            captions_per_image=1,
            statistics={"train": Count(34_674, 3_102, 34_674), "test": Count(19_848, 1_000, 19_848)},
            camera=r"^\d+_\d+_(\d+)_",
        ),
        Layout(
            name="rstpreid",
            annotation="data_captions.json",
            image_key="img_path",
            first_identity=0,
            captions_per_image=2,
            statistics={
                "train": Count(18_505, 3_701, 37_010),
                "val": Count(1_000, 200, 2_000),
                "test": Count(1_000, 200, 2_000),
            },
            camera=r"_c(\d+)_",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The contents of a dataset's annotation file.

    Attributes:
        layout: layout of the dataset.
        records: usable records.
        rejects: unusable records and captions.
        content: bytes of the file.
        attributes: ground truth of drawn pedestrians, {"vocabulary": …, "images": […]}; None for other datasets.
    """

    layout: Layout
    records: tuple[Record, ...]
    rejects: tuple[Reject, ...]
    content: bytes
    attributes: dict[str, Any] | None


def read_annotations(source: str, layout: str = "auto") -> Annotations:
    """Read the annotation file of a dataset.

    Args:
        source: folder or URI of the dataset.
        layout: key in LAYOUTS, or "auto" to choose the layout by the annotation file.

    Raises:
        DatasetError: the annotation file is missing, is not a JSON list, or has no usable record.
    """
    fs, root = filesystem(source)
    chosen = find_layout(fs, root, source, layout)
    path = f"{root}/{chosen.annotation}"
    require_inside(fs, root, chosen.annotation)
    content = fs.cat_file(path)
    items = _parse(content, path)
    if not isinstance(items, list):
        raise DatasetError(f"{path}: expected a JSON list of records, found {type(items).__name__}")
    records, rejects = read_records(items, chosen)
    if not records:
        reasons = Counter(f"{reject.reason} ({reject.detail})" for reject in rejects).most_common(3)
        raise DatasetError(
            f"{path}: none of its {len(items)} records can be used; most common: "
            + "; ".join(f"{count} x {reason}" for reason, count in reasons)
        )
    return Annotations(chosen, tuple(records), tuple(rejects), content, read_attributes(fs, root))


def read_attributes(fs: Any, root: str) -> dict[str, Any] | None:
    """Read the ground truth of drawn pedestrians, {"vocabulary": …, "images": […]}; None for other datasets."""
    path = f"{root}/{ATTRIBUTES_FILE}"
    require_inside(fs, root, ATTRIBUTES_FILE)
    return _parse(fs.cat_file(path), path) if fs.exists(path) else None


def find_layout(fs: Any, root: str, source: str, layout: str = "auto") -> Layout:
    """The layout of a dataset, with the spelling of its annotation file.

    Args:
        fs: the dataset's filesystem.
        root: its path.
        source: the same as somebody wrote it, for errors.
        layout: key in LAYOUTS, whose annotation file may then have any name if it is alone, or "auto".

    Raises:
        DatasetError: none or several are there.
    """
    candidates = list(LAYOUTS.values()) if layout == "auto" else [LAYOUTS[layout]]
    files = _json_files(fs, root)
    present = present_layouts(fs, root, candidates)
    if layout != "auto" and not present and len(files) == 1:
        return dataclasses.replace(LAYOUTS[layout], annotation=files[0])
    if len(present) == 1:
        return present[0]
    if not present:
        names = ", ".join(candidate.annotation for candidate in candidates)
        there = f"it has {', '.join(files)}, whose records may fit after renaming" if files else "it has no JSON file"
        raise DatasetError(
            f"no annotation file in {source!r}: looked for {names}, and {there}; pass --source with a folder that has "
            "one of them beside imgs/"
        )
    raise DatasetError(
        f"{source!r} has several annotation files ({', '.join(candidate.annotation for candidate in present)}); "
        "choose one with --layout"
    )


def present_layouts(fs: Any, root: str, candidates: Sequence[Layout] = tuple(LAYOUTS.values())) -> list[Layout]:
    """Layouts whose annotation file is in a folder. People are handed ICFG_PEDES.json and other spellings of a name."""
    files = _json_files(fs, root)
    return [
        dataclasses.replace(candidate, annotation=file)
        for candidate in candidates
        for file in ([candidate.annotation] if candidate.annotation in files else files)
        if _spelling(file) == _spelling(candidate.annotation)
    ]


def _json_files(fs: Any, root: str) -> list[str]:
    """Names of the JSON files in a folder, which may not exist."""
    try:
        names = (PurePosixPath(path).name for path in fs.ls(root, detail=False))
        return sorted(name for name in names if name.lower().endswith(".json") and name != ATTRIBUTES_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _spelling(name: str) -> str:
    return name.lower().replace("-", "_")


def _parse(content: bytes, path: str) -> Any:
    try:
        return json.loads(content, parse_int=parse_int)
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{path} ({len(content)} bytes) is not valid JSON: {error}; download the file again from its publisher"
        ) from None


def read_records(items: Sequence[Any], layout: Layout) -> tuple[list[Record], list[Reject]]:
    """Sort the items of an annotation list into usable records and rejects.

    Captions are checked one by one. An image without a usable caption is kept, because a search can still return it.
    """
    records: dict[str, Record] = {}
    rejects: list[Reject] = []
    for position, item in enumerate(items):
        problem = _find_problem(item, layout, position)
        if problem is not None:
            rejects.append(problem)
            continue
        path = _normal_path(item[layout.image_key])
        earlier = records.get(path)
        if earlier is not None and (earlier.identity, earlier.split) != (item["id"], item["split"]):
            detail = f"record {position} names an image of another person or split; the first one is kept"
            rejects.append(Reject(path, "duplicated_record", detail))
            continue
        captions, unusable = read_captions(item["captions"], path, earlier.captions if earlier else ())
        rejects += unusable
        if earlier is None:
            camera = re.search(layout.camera, PurePosixPath(path).name) if layout.camera else None
            records[path] = Record(path, item["id"], item["split"], captions, camera[1] if camera else None)
        elif captions:  # some files have a record per caption
            records[path] = dataclasses.replace(earlier, captions=(*earlier.captions, *captions))
        elif not unusable:
            detail = f"record {position} repeats an earlier record, which is kept"
            rejects.append(Reject(path, "duplicated_record", detail))
    return list(records.values()), rejects


def _normal_path(path: str) -> str:
    """A path below imgs/, from the spellings that people are handed."""
    return path.replace("\\", "/").removeprefix("./").removeprefix("imgs/")


def _find_problem(item: Any, layout: Layout, position: int) -> Reject | None:
    """Return a reject if the item at this position of the annotation list is not a usable record."""
    where = f"record {position}"
    if not isinstance(item, dict):
        return Reject(where, "not_a_record", f"expected an object, found {item!r:.100}")
    path = item.get(layout.image_key)
    key = path if isinstance(path, str) and path else where
    missing = [name for name in ("id", "split", "captions", layout.image_key) if name not in item]
    if missing:
        detail = f"no {', '.join(missing)}; the record has {', '.join(map(str, item))}"
        return Reject(key, "missing_key", detail)
    identity, split, captions = item["id"], item["split"], item["captions"]
    if not isinstance(path, str) or not path or not is_text(path):
        return Reject(key, "bad_path", f"expected a path below imgs/, found {path!r:.100}")
    normal = PurePosixPath(_normal_path(path))
    if normal.is_absolute() or ".." in normal.parts or not normal.name:
        return Reject(key, "bad_path", f"expected a path below imgs/, found {path!r:.100}")
    if isinstance(identity, bool) or not isinstance(identity, int) or not -(2**63) <= identity < 2**63:
        return Reject(key, "bad_identity", f"expected an integer of 64 bits under id, found {identity!r:.100}")
    if not isinstance(split, str) or split not in SPLITS:
        return Reject(key, "bad_split", f"expected one of {', '.join(SPLITS)}, found {split!r:.100}")
    if not isinstance(captions, list):
        return Reject(key, "bad_captions", f"expected a list of sentences, found {captions!r:.100}")
    return None


def differences(layout: Layout, counts: Mapping[str, Count]) -> list[str]:
    """Compare counts with the published ones: one message for each difference."""
    messages = []
    for split in sorted(layout.statistics.keys() | counts.keys()):
        published, actual = layout.statistics.get(split), counts.get(split)
        if published is None or actual is None:
            problem = "not a published split" if published is None else "missing here"
            messages.append(f"{layout.name} {split}: {problem}")
            continue
        for name in ("images", "identities", "captions"):
            expected, count = getattr(published, name), getattr(actual, name)
            if expected is not None and expected != count:
                messages.append(f"{layout.name} {split}: {count:,} {name} here, {expected:,} published")
    return messages
