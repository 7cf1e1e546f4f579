"""Ingest: a published layout (annotation file and imgs/) becomes the tables images and captions.

    python jobs/ingest.py --source CUHK-PEDES --data s3://bucket/cuhk

Ray workers decode every image to check it; the tables keep the original bytes.
"""

from __future__ import annotations

import hashlib
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from ceca.commandline import parse_arguments
from ceca.config import IngestConfig
from ceca.data.changes import erased_images
from ceca.data.schema import ATTRIBUTES, CAPTIONS, IMAGES, SCHEMA_VERSION, caption_id, image_id
from ceca.data.store import Manifest, Reject, Store, StoreError, filesystem, version_of
from ceca.datasets.images import ImageError, check_image
from ceca.datasets.layouts import Annotations, Record, count_splits, differences, read_annotations, read_attributes
from ceca.settings import to_mapping
from jobs.runtime.console import console, entry, label, text_table
from jobs.runtime.records import cut, from_json, to_json
from jobs.runtime.units import Output, Plan, Workers, run_plan


def ingest(data: str, config: IngestConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish the tables images and captions, and attributes if the pedestrians are drawn.

    Args:
        data: dataset URI.
        config: source, layout and size of the parts.
        redo: make a new version even if this one is published.

    Returns:
        The manifest of each table.
    """
    store = Store(data)
    annotations = read_annotations(config.source, config.layout)
    print_statistics(annotations)
    batches = cut(annotations.records[: config.limit], config.images_per_part)
    settings = to_mapping(config, results_only=True)
    tables: tuple[str, ...] = ("captions", "images")
    notes: dict[str, Any] = {"layout": annotations.layout.name}
    if annotations.attributes is not None:
        tables = ("captions", "attributes", "images")
        notes["vocabulary"] = annotations.attributes["vocabulary"]
    digest = hashlib.sha256(annotations.content).hexdigest()
    # The folder's name is not part of the version: the same dataset elsewhere is the same dataset.
    decides = {**settings, "source": "", "layout": annotations.layout.name}
    plan = Plan(
        stage="ingest",
        version=version_of("ingest", SCHEMA_VERSION, digest, notes, decides),
        tables=tables,
        units=[to_json(records) for records in batches],
        sizes=[len(records) for records in batches],
        worker=IngestWorker,
        arguments={
            "source": config.source if "://" in config.source else filesystem(config.source)[1],
            "data": store.uri,
        },
        made_from={"annotation": digest},
        config=settings,
        rejects=annotations.rejects,
        notes=notes,
    )
    return run_plan(store, plan, Workers(len(batches), cpus=config.cpus_per_task), redo=redo)


class IngestWorker:
    """Reads and checks the images of some records. A unit of work is a list of Record as JSON."""

    def __init__(self, source: str, data: str):
        self.fs, self.root = filesystem(source)
        self.erased = erased_images(Store(data))  # they do not come back, whatever the source still has
        # Each worker reads the ground truth itself: it is as large as the annotations, too large for the plan.
        truth = read_attributes(self.fs, self.root)
        self.attributes = {image["path"]: image for image in truth["images"]} if truth else {}

    def __call__(self, work: list[Any]) -> Output:
        whole = from_json(Record, work)
        records = [record for record in whole if record.image_id not in self.erased]
        images, captions, attributes, rejects = [], [], [], []
        with ThreadPoolExecutor(16) as readers:  # an object store answers many requests at once
            contents = readers.map(self._read, [record.source_path for record in records])
        for record, content in zip(records, contents, strict=True):
            if isinstance(content, Reject):
                rejects.append(content)
                continue
            path = record.source_path
            try:
                width, height = check_image(content)
            except ImageError as error:
                rejects.append(Reject(path, error.reason, error.detail))
                continue
            key = image_id(path)
            images.append((key, record.identity, record.split, record.camera, content, width, height, path))
            captions += [
                (caption_id(key, position), key, record.identity, record.split, text)
                for position, text in record.captions
            ]
            if path in self.attributes:
                truth = self.attributes[path]
                attributes.append(
                    (key, truth["view"], truth["lighting"], truth["occluded"], list(truth["attributes"].items()))
                )
        tables = {"images": _table(images, IMAGES), "captions": _table(captions, CAPTIONS)}
        if self.attributes:
            tables["attributes"] = _table(attributes, ATTRIBUTES)
        return Output(tables, rejects, {"erased_images": len(whole) - len(records)})

    def _read(self, path: str) -> bytes | Reject:
        # Some file systems spell an accented letter as one character, others as two.
        for spelling in dict.fromkeys((path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))):
            content = self._read_file(path, f"{self.root}/imgs/{spelling}")
            if not isinstance(content, Reject) or content.reason != "missing_file":
                return content
        return content

    def _read_file(self, path: str, place: str) -> bytes | Reject:
        if isinstance(self.fs, LocalFileSystem):
            problem = find_file_problem(Path(place), Path(self.root) / "imgs")
            if problem is not None:
                return Reject(path, *problem)
        try:
            return self.fs.cat_file(place)
        except (FileNotFoundError, IsADirectoryError):
            return Reject(path, "missing_file", f"no {place}")
        except OSError as error:
            raise StoreError(f"cannot read {place}: {error}") from error


def find_file_problem(file: Path, folder: Path) -> tuple[str, str] | None:
    """Why a local file is not read, as a reject's reason and detail; None if it can be.

    Args:
        file: the file.
        folder: the folder of the dataset's images, outside which nothing is read.
    """
    try:
        resolved = file.resolve(strict=True)
        if not resolved.is_relative_to(folder.resolve()):
            return "outside_the_dataset", f"{file} leads to {resolved}; a dataset's images stay in {folder}"
        if not resolved.is_file():
            return "missing_file", f"{file} is no file"
        with resolved.open("rb"):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return "missing_file", f"no {file}"
    except (OSError, RuntimeError, ValueError) as error:  # not allowed, a circle of links, a name that is too long
        return "unreadable_file", f"{file}: {error}"


def _table(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def print_statistics(annotations: Annotations) -> None:
    """Print the dataset's size by split, and a warning for each number that differs from the published one."""
    counts = count_splits(annotations.records)
    title = f"{annotations.layout.name}: {annotations.layout.annotation}"
    table = text_table(title, "split", "images", "identities", "captions", left="split")
    for split, count in counts.items():
        table.add_row(split, f"{count.images:,}", f"{count.identities:,}", f"{count.captions:,}")
    console.print(table)
    if annotations.attributes is not None:
        console.print("drawn pedestrians in this layout: the published figures do not apply")
        return
    for difference in differences(annotations.layout, counts):
        label("warning", "yellow", difference)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("ingest", argv, prog="ingest")
    ingest(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
