"""A dataset that has rows of its images in every kind of object, and functions that read it back."""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ceca.data import schema
from ceca.data.changes import write_added
from ceca.data.schema import image_id
from ceca.data.store import Manifest, Part, Receipt, Reject, Store

IDS = [image_id(f"{number}.jpg") for number in range(12)]
GONE = (IDS[1], IDS[4], IDS[5], IDS[11])


def word(image: str) -> str:
    """A word that is in every text and in the bytes of this image, and in nothing of any other image."""
    return f"word{IDS.index(image):02d}"


def rows_of(table: str, image: str) -> list[dict[str, Any]]:
    number, said = IDS.index(image), word(image)
    embedded = {"global": [number + 0.5] * 2, "local": [number + 0.25] * 2}
    known = {"image_id": image, "identity": number // 2, "split": "test"}
    dialogue = {
        "turns": [{"question": "what?", "answer": said}],
        "summary": f"it is {said}",
        "attributes": [("hat", said)],
    }
    caption = {"caption_id": f"{image}-0", **known, "text": f"a caption of {said}"}
    seen = {"camera": said, "image": f"bytes of {said}".encode() * 9, "width": 1, "height": 1}
    seen["source_path"] = f"{number}.jpg"
    generated = {"model": "m", "prompt_version": "1", "generation_settings": "{}"}
    rows: dict[str, list[dict[str, Any]]] = {
        "images": [{**known, **seen}],
        "captions": [caption, {**caption, "caption_id": f"{image}-1"}],
        "attributes": [
            {"image_id": image, "view": said, "lighting": "day", "occluded": False, "attributes": [("hat", said)]}
        ],
        "dialogues": [
            {"image_id": image, **dialogue, "flags": [], **generated}
            | dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), 1)
        ],
        "gallery": [{**known, **embedded, "model_digest": "d"}],
        "queries": [{"caption_id": f"{image}-{nth}", "identity": number // 2, **embedded} for nth in range(2)],
        "added": [{**known, **seen, **dialogue, "flags": [], "dialogue_model": "m", **embedded}],
    }
    return rows[table]


SCHEMAS = {
    "images": schema.IMAGES,
    "captions": schema.CAPTIONS,
    "attributes": schema.ATTRIBUTES,
    "dialogues": schema.DIALOGUES,
    "gallery": schema.gallery(2, 2),
    "queries": schema.queries(2, 2),
    "added": schema.added(2, 2),
}


def table_of(table: str, images: Collection[str]) -> pa.Table:
    return pa.Table.from_pylist([row for image in images for row in rows_of(table, image)], SCHEMAS[table])


def write(store: Store, place: str, version: str, *units: Collection[str], first: int = 0) -> list[Part]:
    kind = place.rpartition("/")[2]
    kind = "gallery" if place.startswith("evaluations") and kind == "images" else kind
    return [store.write_part(place, version, n, table_of(kind, unit)) for n, unit in enumerate(units, first)]


def publish(
    store: Store, stage: str, version: str, parts: dict[str, list[Part]], rejects: Any = (), made_from: Any = None
) -> Manifest:
    """Publish tables from these parts; returns the last table's manifest."""
    receipts = [Receipt({table: part}) for table, written in parts.items() for part in written]
    manifests = store.publish(
        stage, version, tuple(parts), receipts, made_from=made_from or {}, config={}, rejects=rejects
    )
    return manifests[tuple(parts)[-1]]


def fill(store: Store) -> None:
    """Fill a dataset with every kind of object. Images of GONE are in all of them, and once alone in a part."""
    thirds = IDS[:4], IDS[4:8], IDS[8:]
    for version, units in (("i1", (IDS[:6], IDS[6:])), ("i2", thirds)):
        rejects = [
            Reject("5.jpg", "duplicated_record", word(IDS[5])),
            Reject(f"{IDS[1]}-1", "empty_caption", word(IDS[1])),
            Reject("6.jpg", "duplicated_record", word(IDS[6])),
        ]
        tables = ("captions", "attributes", "images")
        publish(store, "ingest", version, {table: write(store, table, version, *units) for table in tables}, rejects)
    dialogues = write(store, "dialogues", "d1", IDS[:4], IDS[4:6])
    publish(store, "dialogue", "d1", {"dialogues": dialogues}, [Reject(IDS[11], "no_answer", word(IDS[11]))])
    dialogues += write(store, "dialogues", "d2", IDS[6:])
    publish(store, "dialogue", "d2", {"dialogues": dialogues})
    embedded = write(store, "gallery", "g1", IDS[:4], IDS[4:6])
    publish(store, "index", "g1", {"gallery": embedded})
    publish(store, "index", "g2", {"gallery": [*embedded, *write(store, "gallery", "g2", IDS[6:9], IDS[9:])]})
    place = "evaluations/digest/test"
    sides = {
        f"{place}/{side}": write(store, f"{place}/{side}", "e1", IDS[:6], IDS[6:]) for side in ("queries", "images")
    }
    publish(store, "evaluate", "e1", sides)
    figures = table_of("captions", IDS).select(["caption_id", "identity", "text"])
    sink = pa.BufferOutputStream()
    pq.write_table(figures, sink)
    store.write_bytes(sink.getvalue().to_pybytes(), f"{place}.queries.parquet")
    for images in ([IDS[0]], [IDS[1]], [IDS[2], IDS[4]]):
        write_added(store, "digest", table_of("added", images))
    for folder, images in (("arrivals", (IDS[5], IDS[6])), ("failed", (IDS[11], IDS[7]))):
        for image in images:
            store.write_json({"image": word(image)}, folder, f"{image}.json")
    # A killed stage leaves parts that no manifest names, and receipts.
    (left,) = write(store, "gallery", "g3", IDS[3:6], first=1)
    write(store, "gallery", "g3", IDS[:1], first=2)
    receipt = Receipt({"gallery": left}, (Reject(IDS[11], "not_an_image", word(IDS[11])),))
    store.write_receipt("index", "g3", 1, receipt)
    curve = pa.BufferOutputStream()
    pq.write_table(pa.table({"loss": [1.0]}), curve)
    store.write_bytes(curve.getvalue().to_pybytes(), "models", "m", "digest", "curve.parquet")
    store.write_json({"digest": "digest"}, "models", "m", "manifest.json")


def contents(store: Store) -> dict[str, bytes]:
    """All objects: path → content."""
    return {name: store.read_bytes(name) for name in store.walk()}


def filled_with(objects: dict[str, bytes] | None = None, place: str = "memory://") -> Store:
    """A new dataset with these objects."""
    store = Store(f"{place}{uuid.uuid4().hex}")
    for name, content in (objects or {}).items():
        store.fs.pipe_file(store.path(name), content)
    return store


def only(objects: dict[str, bytes], *kinds: str) -> dict[str, bytes]:
    """The objects below these paths."""
    return {name: content for name, content in objects.items() if name.startswith(kinds)}


def decoded(content: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(content))


@functools.cache
def rows_in(content: bytes) -> list[dict[str, Any]]:
    return decoded(content).to_pylist()


@functools.cache
def text_in(content: bytes) -> bytes:
    """The bytes of an object, and its rows as text if it is a Parquet file."""
    return content + (repr(rows_in(content)).encode() if content[:4] == b"PAR1" else b"")


def is_of(row: dict[str, Any], ids: Collection[str]) -> bool:
    texts = json.dumps(row, default=str)
    return any(image in texts or word(image) in texts for image in ids)


def state(store: Store) -> dict[str, list[dict[str, Any]]]:
    """Rows that readers see: of each manifest, of each object without a manifest, and of all objects in added/."""
    objects, seen = contents(store), {}
    for name, content in objects.items():
        if name.endswith("manifest.json") and "parts" in (manifest := json.loads(content)):
            rows = []
            for part in manifest["parts"]:
                written = objects[f"{manifest['table']}/{part['path']}"]
                assert (len(written), hashlib.sha256(written).hexdigest()) == (part["bytes"], part["sha256"])
                assert len(rows_in(written)) == part["rows"]
                rows += rows_in(written)
            assert len(rows) == manifest["rows"]
            seen[name] = rows
        elif name.endswith(".queries.parquet"):
            seen[name] = rows_in(content)
    added = {
        row["image_id"]: row
        for name, content in objects.items()
        if name.startswith("added/")
        for row in rows_in(content)
    }
    seen["added"] = [added[image] for image in sorted(added)]
    return seen


def without(before: dict[str, list[dict[str, Any]]], ids: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [row for row in rows if not (is_of(row, ids) or image_id(str(row.get("key"))) in ids)]
        for name, rows in before.items()
    }


def assert_erased(store: Store, ids: Collection[str]) -> None:
    for name, content in contents(store).items():
        if name.startswith("removed/"):
            continue
        text = text_in(content)
        left = [image for image in ids if image.encode() in text or word(image).encode() in text]
        assert not left, name
