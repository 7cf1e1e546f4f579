"""Ingest: a published layout (annotation file and imgs/) becomes the tables images and captions.

    python jobs/ingest.py --source CUHK-PEDES --data s3://bucket/cuhk

Images are decoded on Ray workers to check them; their bytes are kept as they came.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from rich.table import Table as TextTable

from ceca.commandline import parse_arguments
from ceca.config import IngestConfig
from ceca.data.schema import ATTRIBUTES, CAPTIONS, IMAGES, SCHEMA_VERSION, caption_id, image_id
from ceca.data.store import Manifest, Reject, Store, StoreError, filesystem, version_of
from ceca.datasets.images import ImageError, check_image
from ceca.datasets.layouts import Annotations, count_splits, differences, read_annotations, read_attributes
from ceca.settings import to_mapping
from jobs.runtime.console import console, entry
from jobs.runtime.units import Output, Plan, run_plan


def ingest(data: str, config: IngestConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish images, captions and, of drawn pedestrians, attributes."""
    store = Store(data)
    annotations = read_annotations(config.source, config.layout)
    print_statistics(annotations)
    records = annotations.records[: config.limit]
    units = [
        [
            [r.source_path, r.identity, r.split, r.camera, list(r.captions)]
            for r in records[start : start + config.images_per_part]
        ]
        for start in range(0, len(records), config.images_per_part)
    ]
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
        units=units,
        sizes=[len(unit) for unit in units],
        worker=IngestWorker,
        arguments={"source": config.source if "://" in config.source else filesystem(config.source)[1]},
        made_from={"annotation": digest},
        config=settings,
        rejects=annotations.rejects,
        notes=notes,
    )
    return run_plan(store, plan, redo=redo, replicas=len(units), cpus=config.cpus_per_task)


class IngestWorker:
    """Reads and checks the images of some records."""

    def __init__(self, source: str):
        self.fs, self.root = filesystem(source)
        # The ground truth goes by the workers and not by the plan: it is as large as the annotations.
        drawn = read_attributes(self.fs, self.root)
        self.attributes = {image["path"]: image for image in drawn["images"]} if drawn else {}

    def __call__(self, work: list[Any]) -> Output:
        images, captions, attributes, rejects = [], [], [], []
        with ThreadPoolExecutor(16) as readers:  # an object store answers many requests at once
            contents = readers.map(self._read, [record[0] for record in work])
        for (path, identity, split, camera, texts), content in zip(work, contents, strict=True):
            if isinstance(content, Reject):
                rejects.append(content)
                continue
            try:
                width, height = check_image(content)
            except ImageError as error:
                rejects.append(Reject(path, error.reason, error.detail))
                continue
            key = image_id(path)
            images.append((key, identity, split, camera, content, width, height, path))
            captions += [(caption_id(key, n), key, identity, split, text) for n, text in texts]
            if path in self.attributes:
                drawn = self.attributes[path]
                attributes.append(
                    (key, drawn["view"], drawn["lighting"], drawn["occluded"], list(drawn["attributes"].items()))
                )
        tables = {"images": _table(images, IMAGES), "captions": _table(captions, CAPTIONS)}
        if self.attributes:
            tables["attributes"] = _table(attributes, ATTRIBUTES)
        return Output(tables, rejects)

    def _read(self, path: str) -> bytes | Reject:
        try:
            return self.fs.cat_file(f"{self.root}/imgs/{path}")
        except (FileNotFoundError, IsADirectoryError):
            return Reject(path, "missing_file", f"no {self.root}/imgs/{path}")
        except OSError as error:
            raise StoreError(f"cannot read {self.root}/imgs/{path}: {error}") from error


def _table(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def print_statistics(annotations: Annotations) -> None:
    """Show the dataset's size by split and warn of every number that differs from the published one."""
    counts = count_splits(annotations.records)
    table = TextTable(title=f"{annotations.layout.name}: {annotations.layout.annotation}", title_justify="left")
    for heading in ("split", "images", "identities", "captions"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, count in counts.items():
        table.add_row(split, f"{count.images:,}", f"{count.identities:,}", f"{count.captions:,}")
    console.print(table)
    if annotations.attributes is not None:
        console.print("drawn pedestrians in this layout: the published figures do not apply")
        return
    for difference in differences(annotations.layout, counts):
        console.print(f"[yellow]warning:[/] {difference}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("ingest", argv, prog="ingest")
    ingest(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
