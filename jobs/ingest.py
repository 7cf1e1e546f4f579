"""Ingest: a source of images (a published layout, a folder, tables, …) becomes the tables images and captions.

    python jobs/ingest.py --source CUHK-PEDES --data s3://bucket/cuhk
    python jobs/ingest.py --source people.csv --columns image=file identity=pid --data s3://bucket/people

The driver lists the records on disk, one at a time. Ray workers decode every image to check it; the tables keep the
original bytes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa

from ceca.commandline import parse_arguments
from ceca.config import IngestConfig
from ceca.data.changes import erased_images
from ceca.data.names import LISTING, WORK, listing_name
from ceca.data.schema import ATTRIBUTES, CAPTIONS, IMAGES, SCHEMA_VERSION, TIME, TRACKLET, caption_id, image_id
from ceca.data.store import Manifest, Receipt, Reject, Store, filesystem, version_of
from ceca.datasets.images import ImageError, check_image
from ceca.datasets.layouts import LAYOUTS, differences
from ceca.datasets.listing import Listing, read_record
from ceca.datasets.records import Record
from ceca.datasets.sources import Source, open_source
from ceca.errors import UserError
from ceca.settings import to_mapping
from jobs.runtime.console import console, entry, label, text_table
from jobs.runtime.units import Output, Plan, Workers, run_plan

TOLD_S = 10.0  # seconds between messages while records are listed


def ingest(data: str, config: IngestConfig, *, redo: bool = False, mirror: bool = False) -> dict[str, Manifest]:
    """Publish the tables images and captions, and attributes if the pedestrians are drawn.

    Args:
        data: dataset URI.
        config: source, form and size of the parts.
        redo: make a new version even if this one is published.
        mirror: with `only_missing`, read everything again if published images are gone from the source.

    Returns:
        The manifest of each table.

    Raises:
        DatasetError: the source cannot be read, or nothing in it can be used.
        UserError: the dataset lies in the folder that is read.
    """
    store = Store(data)
    source = open_source(
        config.source, config.layout, columns=config.columns, images=config.images, share=config.split_share
    )
    if source.name == "folder" and f"{store.root}/".startswith(f"{source.files.root}/"):
        raise UserError(f"{store.uri} lies in {config.source}, whose files are all read: give another --data")
    with Listing(_told(source.records())) as listing:
        listing.refuse_empty(source.place)
        print_statistics(source, listing)
        earlier = _earlier(store) if config.only_missing else {}
        if earlier:
            gone = listing.lacks(_ids(store, earlier["images"]))
            if gone and mirror:
                console.print(f"ingest: {len(gone):,} images are gone from the source; all others are read again")
                earlier, config = {}, dataclasses.replace(config, only_missing=False)
            elif _is_unchanged(earlier["images"], source.fingerprint or listing.digest, config):
                console.print(f"ingest: {store.place('images')} lacks nothing")
                return earlier
            elif gone:
                console.print(f"ingest: {len(gone):,} published images are not in the source now, and stay")
        if earlier:
            listing.leave_out(_ids(store, earlier["images"]))
            if not len(listing):
                console.print(f"ingest: {store.place('images')} lacks nothing")
                return earlier
        plan = _plan(store, config, source, listing, earlier)
        manifests = run_plan(store, plan, Workers(len(plan.units), cpus=config.cpus_per_task), redo=redo)
    store.remove(WORK, LISTING, plan.version)
    return manifests


def _earlier(store: Store) -> dict[str, Manifest]:
    """The published tables, empty if there are none."""
    images = store.manifest("images")
    if images is None:
        return {}
    tables = {name: store.belonging(name, images) for name in ("captions", "attributes")}
    return {"images": images, **{name: manifest for name, manifest in tables.items() if manifest is not None}}


def _ids(store: Store, images: Manifest) -> list[str]:
    """Ids of the images in a table."""
    ids: list[str] = store.read(images, ["image_id"])["image_id"].to_pylist() if images.rows else []
    return ids


def _is_unchanged(images: Manifest, digest: str, config: IngestConfig) -> bool:
    """Whether a table was made of the same listing. Files that could not be read may be there now."""
    retried = {"missing_file", "unreadable_file"} & images.notes["rejects"].keys()
    return images.made_from.get("annotation") == digest and images.config.get("limit") == config.limit and not retried


def _plan(store: Store, config: IngestConfig, source: Source, listing: Listing, earlier: dict[str, Manifest]) -> Plan:
    """The units of work. A unit is a number; its records wait in the store, as many as there may be."""
    settings = to_mapping(config, results_only=True)
    tables: tuple[str, ...] = ("captions", "images")
    notes: dict[str, Any] = {"layout": source.name}
    if source.attributes is not None:
        tables = ("captions", "attributes", "images")
        notes["vocabulary"] = source.attributes["vocabulary"]
    digest = source.fingerprint or listing.digest
    # The folder's name is not part of the version: the same dataset elsewhere is the same dataset.
    decides = {**settings, "source": "", "layout": source.name}
    described = ["ingest", SCHEMA_VERSION, digest, notes, decides]
    made_from = {"annotation": digest}
    if earlier:
        made_from["images"] = earlier["images"].version
        described.append(made_from["images"])
    version = version_of(*described)
    total = min(len(listing), config.limit or len(listing))
    sizes = [min(config.images_per_part, total - start) for start in range(0, total, config.images_per_part)]

    def prepare() -> None:
        for unit, lines in enumerate(listing.cut(config.images_per_part, config.limit)):
            store.write_bytes("\n".join(lines).encode(), WORK, LISTING, version, listing_name(unit))

    return Plan(
        stage="ingest",
        version=version,
        tables=tables,
        units=range(len(sizes)),
        sizes=sizes,
        worker=IngestWorker,
        arguments={
            "source": {
                "source": config.source if "://" in config.source else filesystem(config.source)[1],
                "layout": source.name,
                "columns": config.columns,
                "images": config.images
                if "://" in config.images or not config.images
                else filesystem(config.images)[1],
            },
            "data": store.uri,
            "version": version,
            "timed": listing.timed,
            "tracked": listing.tracked,
        },
        made_from=made_from,
        config=settings,
        rejects=listing.rejects,
        kept=[Receipt({table: part}) for table, manifest in earlier.items() for part in manifest.parts],
        notes=notes,
        prepare=prepare,
    )


class IngestWorker:
    """Reads and checks the images of some records. A unit of work is the number of their listing.

    Args:
        source: arguments of `open_source`.
        data: dataset URI.
        version: the version that is made.
        timed: write the time of each image.
        tracked: write the tracklet of each image.
    """

    def __init__(
        self, source: dict[str, Any], data: str, version: str = "", timed: bool = False, tracked: bool = False
    ):
        self.source, self.timed, self.tracked = open_source(**source), timed, tracked
        self.store, self.version = Store(data), version
        self.erased = erased_images(self.store)  # they do not come back, whatever the source still has
        # Each worker reads the ground truth itself: it is as large as the annotations, too large for the plan.
        truth = self.source.attributes
        self.attributes = {image["path"]: image for image in truth["images"]} if truth else {}

    def __call__(self, work: int) -> Output:
        lines = self.store.read_bytes(WORK, LISTING, self.version, listing_name(work)).decode().split("\n")
        return self.check([read_record(line) for line in lines])

    def check(self, whole: Sequence[Record]) -> Output:
        """Rows of the tables for these records, and a reject for each image that cannot be used."""
        records = [record for record in whole if record.image_id not in self.erased]
        images, captions, attributes, rejects = [], [], [], []
        for record, content in zip(records, self.source.read(records), strict=True):
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
            more: list[Any] = [datetime.fromisoformat(record.time) if record.time else None] if self.timed else []
            more += [record.tracklet] if self.tracked else []
            images.append((key, record.identity, record.split, record.camera, content, width, height, path, *more))
            captions += [
                (caption_id(key, position), key, record.identity, record.split, text)
                for position, text in record.captions
            ]
            if path in self.attributes:
                truth = self.attributes[path]
                attributes.append(
                    (key, truth["view"], truth["lighting"], truth["occluded"], list(truth["attributes"].items()))
                )
        schema = pa.schema([*IMAGES, *([TIME] if self.timed else []), *([TRACKLET] if self.tracked else [])])
        tables = {"images": _table(images, schema), "captions": _table(captions, CAPTIONS)}
        if self.attributes:
            tables["attributes"] = _table(attributes, ATTRIBUTES)
        return Output(tables, rejects, {"erased_images": len(whole) - len(records)})


def _table(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _told(records: Iterable[Record | Reject]) -> Iterator[Record | Reject]:
    """The same records, and a message now and then."""
    told = time.monotonic()
    for number, record in enumerate(records):
        if time.monotonic() - told > TOLD_S:
            told = time.monotonic()
            console.print(f"ingest: {number:,} records listed")
        yield record


def print_statistics(source: Source, listing: Listing) -> None:
    """Print the dataset's size by split, and a warning for each number that differs from the published one."""
    counts = listing.counts()
    table = text_table(f"{source.name}: {source.place}", "split", "images", "identities", "captions", left="split")
    for split, count in counts.items():
        table.add_row(split, f"{count.images:,}", f"{count.identities:,}", f"{count.captions:,}")
    console.print(table)
    if source.attributes is not None:
        console.print("drawn pedestrians in this layout: the published figures do not apply")
        return
    for difference in differences(LAYOUTS[source.name], counts) if source.name in LAYOUTS else ():
        label("warning", "yellow", difference)
    if source.found and source.name != "folder":
        said = ", ".join(f"{says} from {' and '.join(names)}" for says, names in source.found.items() if names)
        nothing = ", ".join(says for says, names in source.found.items() if not names)
        console.print(f"ingest: {said}" + (f"; nothing says {nothing} (--columns)" if nothing else ""))


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("ingest", argv, prog="ingest")
    ingest(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
