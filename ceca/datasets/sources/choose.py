"""Which source a folder or file is: found by what lies there, or named."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from ceca.data.store import Reject, filesystem
from ceca.datasets.layouts import LAYOUTS, find_layout, present_layouts
from ceca.datasets.links import require_inside
from ceca.datasets.records import DatasetError
from ceca.datasets.rows import SPLIT_NAMES, Row, find_columns, parse_columns
from ceca.datasets.sources.arrow import STATE, arrow_rows, parquet_rows, saved_files
from ceca.datasets.sources.files import Files, folder_rows
from ceca.datasets.sources.lance import ENDING, lance_folders, lance_rows
from ceca.datasets.sources.layout import LayoutSource
from ceca.datasets.sources.source import Source
from ceca.datasets.sources.tables import ENDINGS, ending, text_rows
from ceca.datasets.sources.tars import PICTURES, tar_rows

TABLES = (*ENDINGS, ".parquet")
HOLDERS = (".parquet", ".tar")  # of files that may hold their pictures


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published dataset as a table: its files, and what their columns say.

    Attributes:
        files: patterns of the files' names.
        columns: what a column says → its names; empty where the dataset says nothing of the kind.
        folders: folders in which the images' paths may be.
        endings: what may follow an image's path.
        base_name: only the last part of a path counts.
        several: it has several files.
    """

    files: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    folders: tuple[str, ...] = ("", "imgs")
    endings: tuple[str, ...] = ("",)
    base_name: bool = False
    several: bool = False


_NOTHING: dict[str, tuple[str, ...]] = {"identity": (), "split": (), "camera": (), "time": (), "tracklet": ()}
_REID = {**_NOTHING, "image": ("file_path",), "identity": ("id",), "text": ("captions",)}
PRESETS = {
    # https://github.com/Zplusdragon/UFineBench; the name of its file is not published there
    "ufine6926": Preset(("*ufine6926*.json",), {**_REID, "split": ("split",)}),
    # https://github.com/Zplusdragon/PLIP
    "synth_pedes": Preset(("synthpedes[-_]dataset.json",), _REID),
    # https://github.com/Shuyu-XJTU/APTM: every image has an image_id of its own
    "mals": Preset(("g_*_attrs.json",), {**_NOTHING, "image": ("image",), "text": ("caption",)}, several=True),
    # The same authors' files of CUHK-PEDES, ICFG-PEDES and RSTPReid, one per split
    "aptm": Preset(
        tuple(f"{name}_{split}.json" for name in ("cuhk", "icfg", "rstp") for split in ("train", "val", "test")),
        {**_NOTHING, "image": ("image",), "identity": ("image_id",), "text": ("caption",)},
        several=True,
    ),
    # https://github.com/WentaoTan/MLLM4Text-ReID: {path: caption}; only the path's file name counts
    "luperson_mllm": Preset(
        tuple(f"T{kind}-{model}.json" for kind in "sd" for model in ("qwen", "shikra")),
        {**_NOTHING, "image": ("image",), "text": ("text",)},
        folders=("LUPerson-MLLM", "", "imgs"),
        base_name=True,
        several=True,
    ),
    # IIITD-20K as its users read it: {number: {"Image ID", "Description 1", "Description 2"}}, an image per person
    "iiitd_20k": Preset(
        ("Filtered.json",),
        {**_NOTHING, "image": ("Image ID",), "text": ("Description 1", "Description 2")},
        folders=("IIITD-20K", "images", "imgs", ""),
        endings=(".jpeg", ".jpg", ".png"),
    ),
}
KINDS = ("folder", "table", "webdataset", "huggingface", "lance")


def open_source(
    source: str,
    layout: str = "auto",
    *,
    columns: Sequence[str] = (),
    images: str = "",
    share: Sequence[float] | None = None,
) -> Source:
    """Open a source.

    Args:
        source: folder, file or URI.
        layout: key of LAYOUTS or PRESETS, or one of KINDS; "auto" finds it.
        columns: what columns of a table say, `image=file identity=pid …`.
        images: folder of the images that a table names, if it is not the table's.
        share: shares of train, val and test of images without a split; None makes them the gallery.

    Raises:
        DatasetError: nothing is there that can be read, or it is not clear what it is.
    """
    fs, root = filesystem(source)
    given = parse_columns(columns)
    files = _files(fs, root) if fs.isdir(root) else []
    if layout == "auto":
        layout = _find_kind(fs, root, source, files, given)
    if layout in LAYOUTS:
        if given or images:
            raise DatasetError(f"--columns and --images are of tables, and {source!r} is read as {layout}")
        return LayoutSource.of(fs, root, source, find_layout(fs, root, source, layout))
    opened = _open_table(fs, root, source, layout, files, images, given)
    return dataclasses.replace(opened, share=share)


def _open_table(
    fs: Any, root: str, source: str, layout: str, files: list[str], images: str, given: Mapping[str, Sequence[str]]
) -> Source:
    """A source other than the layouts with published counts."""
    if layout == "folder":
        if not fs.isdir(root):
            raise DatasetError(f"{source!r} is no folder")
        return Source("folder", source, Files(fs, root), lambda: [folder_rows(fs, root)], {"image": ("image",)})
    if layout == "huggingface":
        return Source(layout, source, Files(fs, root), partial(_saved_rows, fs, root), given)
    if layout == "lance":
        if not fs.isdir(root) or not (folders := lance_folders(fs, root, files)):
            raise DatasetError(f"{source!r} is no Lance dataset, and holds none")
        return Source(layout, source, Files(fs, root), partial(_lance_rows, fs, root, folders), given)
    home, names = root, files
    if not fs.isdir(root):
        home, _, name = root.rpartition("/")
        names = [name]
    preset = PRESETS.get(layout, Preset((), {}))
    chosen = _choose(layout, preset, names)
    for name in chosen if home == root else ():  # a file that somebody names may be a link
        require_inside(fs, root, name)
    if not chosen:
        raise DatasetError(f"{source!r} has no file of a {layout}: it has {', '.join(names[:5]) or 'nothing'}")
    if len(chosen) > 1 and preset.files and not preset.several:
        raise DatasetError(f"{source!r} has several annotation files ({', '.join(chosen)}); pass one as --source")
    if images and any(ending(name) in HOLDERS for name in chosen):
        raise DatasetError("--images is of tables of text; tar and Parquet files hold their images")
    pictures = Files(fs, filesystem(images)[1] if images else home, preset.folders, preset.endings)
    shown = f"{source.rstrip('/')}/{chosen[0]}" if len(chosen) == 1 and home == root else source
    rows = partial(_rows_of_all, fs, home, chosen)
    return Source(layout, shown, pictures, rows, {**preset.columns, **given}, preset.base_name)


def _choose(layout: str, preset: Preset, names: Sequence[str]) -> list[str]:
    """The files of a source of this kind among these."""
    if preset.files:
        fitting = [name for name in names if _fits(name, preset.files)]
        return fitting or [name for name in names if ending(name) == ".json"]  # under a name of somebody's own
    return [name for name in names if ending(name) in ((".tar",) if layout == "webdataset" else TABLES)]


def _rows_of_all(fs: Any, home: str, names: Sequence[str]) -> Iterator[Iterator[Row | Reject]]:
    for name in names:
        yield _marked(_rows_of(fs, home, name), _split_of(name))


def _saved_rows(fs: Any, root: str) -> Iterator[Iterator[Row | Reject]]:
    for name, split, of in saved_files(fs, root):
        require_inside(fs, root, name)
        yield _marked(arrow_rows(fs, f"{root}/{name}", name, of), split)


def _lance_rows(fs: Any, root: str, folders: Sequence[str]) -> Iterator[Iterator[Row | Reject]]:
    for name in folders:
        if name:
            require_inside(fs, root, name)
        yield _marked(lance_rows(fs, f"{root}/{name}".rstrip("/"), name), _split_of(name))


def _rows_of(fs: Any, home: str, name: str) -> Iterable[Row | Reject]:
    path = f"{home}/{name}"
    if ending(name) == ".parquet":
        return parquet_rows(fs, path, name)
    return tar_rows(fs, path, name) if ending(name) == ".tar" else text_rows(fs, path, name)


def _marked(rows: Iterable[Row | Reject], said: str | None) -> Iterator[Row | Reject]:
    """Rows with the split that the name of their file says."""
    split = SPLIT_NAMES.get((said or "").lower())
    for row in rows:
        yield dataclasses.replace(row, split=split) if isinstance(row, Row) and split else row


def _split_of(name: str) -> str | None:
    """The split that a file's name says: `train-00000-of-00002.parquet`, `cuhk_test.json`, `test/0.tar`.

    >>> _split_of("data/validation-00000-of-00001.parquet"), _split_of("cuhk_test.json"), _split_of("contest.csv")
    ('validation', 'test', None)
    """
    folder, _, last = name.rpartition("/")
    words = last.partition(".")[0].replace("_", "-").lower().split("-")
    said = [word for word in (words[0], words[-1], folder.rpartition("/")[2].lower()) if word in SPLIT_NAMES]
    return said[0] if said else None


def _files(fs: Any, root: str) -> list[str]:
    """Names of the files in a folder, and below it, in some folders, of Parquet and tar files and pictures.

    Folders of Lance datasets are among them, with a slash at the end.
    """
    found = []
    for folder, folders, names in itertools.islice(fs.walk(root, maxdepth=2), 1000):
        below = folder[len(root) :].strip("/")
        folders.sort()
        if not below:
            found += [f"{name}/" for name in folders if name.endswith(ENDING)]
        for name in sorted(names):
            told = not below or ending(name) in HOLDERS or ending(name)[1:] in PICTURES
            if name and not name.startswith(".") and told:
                found.append(f"{below}/{name}".lstrip("/"))
    return sorted(found)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(PurePosixPath(name).name.lower(), pattern.lower()) for pattern in patterns)


def _find_kind(fs: Any, root: str, source: str, files: list[str], given: Mapping[str, Sequence[str]]) -> str:
    """The kind of a source by what lies there. What could be annotations is never left aside in silence."""
    if not fs.isdir(root):
        kind = ending(root)
        preset = next((name for name, preset in PRESETS.items() if _fits(root, preset.files)), "table")
        if kind == ".tar" or kind in TABLES:
            return "webdataset" if kind == ".tar" else preset
        if not fs.exists(root):
            raise DatasetError(f"no {source!r}: pass --source with a folder of pictures, a table or a dataset")
        raise DatasetError(f"{source!r} is no source: expected a folder, {', '.join(TABLES)} or .tar")
    if STATE in files or "dataset_dict.json" in files:
        return "huggingface"
    if lance_folders(fs, root, files):
        return "lance"
    if present_layouts(fs, root) and not given:
        return find_layout(fs, root, source).name
    presets = {name for name, preset in PRESETS.items() if any(_fits(file, preset.files) for file in files)}
    if len(presets) == 1:
        return presets.pop()
    kinds = {"webdataset" if ending(file) == ".tar" else "table" for file in files if _is_manifest(file)}
    if "webdataset" in kinds and any(ending(file)[1:] in PICTURES for file in files):
        raise DatasetError(f"{source!r} has tar files and pictures; choose with --layout webdataset or --layout folder")
    if len(kinds) > 1:
        raise DatasetError(f"{source!r} has tables and tar files; choose with --layout table or --layout webdataset")
    if not kinds:
        return "folder"
    kind = kinds.pop()
    if kind == "table" and not given:
        _require_columns(fs, root, source, [file for file in files if _is_manifest(file)])
    return kind


def _is_manifest(file: str) -> bool:
    return ending(file) in (*TABLES, ".tar")


def _require_columns(fs: Any, root: str, source: str, tables: Sequence[str]) -> None:
    """Refuse a folder with tables that may or may not name its images."""
    for name in tables:
        try:
            rows = itertools.islice(_rows_of(fs, root, name), 10)
            there = dict.fromkeys(column for row in rows if isinstance(row, Row) for column in row.values)
            find_columns(list(there), {}, name)
        except DatasetError as error:
            if any(ending(table) == ".json" for table in tables):
                find_layout(fs, root, source)  # its error says more
            raise DatasetError(
                f"{source!r} has {', '.join(tables)}, and it is not clear what it says: {error}; --layout folder reads "
                "the pictures alone"
            ) from None
