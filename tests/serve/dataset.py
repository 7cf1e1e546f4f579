"""A small dataset of figures, published as the stages would, for the tests of the service."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pyarrow as pa
import torch
from PIL import Image, ImageDraw

from ceca.config import ModelConfig
from ceca.data import schema
from ceca.data.store import Receipt, Store
from ceca.datasets.images import decode_image
from ceca.model.backbone import tokenize
from ceca.model.ceca import CECA
from ceca.model.embed import normalize
from ceca.model.registry import PublishedModel
from ceca.model.weights import publish_model, serialize

COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "white", "orange")
TINY = ModelConfig(backbone="ceca-tiny", image_height=128, image_width=64, mixer_heads=4, local_dim=256)
QUERY = "a person in a red shirt and blue trousers"


def draw_person(number: int) -> bytes:
    """A figure with coloured clothes, encoded as JPEG, or as PNG every fifth time."""
    image = Image.new("RGB", (64, 160), (200, 200 - 4 * number, 190))
    pen = ImageDraw.Draw(image)
    pen.ellipse((24, 10, 40, 30), fill="tan")
    pen.rectangle((16, 32, 48, 90), fill=COLOURS[number % len(COLOURS)])
    pen.rectangle((20, 90, 44, 150), fill=COLOURS[(3 * number + 1) % len(COLOURS)])
    content = io.BytesIO()
    image.save(content, "PNG" if number % 5 == 4 else "JPEG")
    return content.getvalue()


def summarize(number: int) -> str:
    upper, lower = COLOURS[number % len(COLOURS)], COLOURS[(3 * number + 1) % len(COLOURS)]
    return f"A person in a {upper} shirt & {lower} trousers <number {number}>."


def taken(number: int) -> datetime:
    """Two pictures a day."""
    return datetime(2026, 3, 1 + number // 2, 8 + number % 2, 30, tzinfo=UTC)


def publish(
    store: Store,
    table: str,
    rows: pa.Table,
    stage: str,
    made_from: dict[str, str],
    notes: dict,
    *,
    config: dict | None = None,
    number: int = 1,
) -> str:
    """A table of two parts, published as a stage would."""
    version, middle = f"{table}-{number}", rows.num_rows // 2 + 1
    receipts = []
    for number, piece in enumerate((rows.slice(0, middle), rows.slice(middle))):
        receipts.append(Receipt({table: store.write_part(table, version, number, piece)}))
    store.publish(stage, version, (table,), receipts, made_from=made_from, config=config or {}, notes=notes)
    return version


def publish_people(store: Store, count: int, asked: dict | None = None, *, structured: bool = True) -> None:
    """The tables images, captions and dialogues; the last image is of the training split.

    `structured`: dialogues have the colour of the upper garment as an attribute; else they mention none.
    """
    ids = [schema.image_id(f"{number:04d}.jpg") for number in range(count)]
    images, captions, dialogues = [], [], []
    for number, image_id in enumerate(ids):
        split = "train" if number == count - 1 else "test"
        common = {"image_id": image_id, "identity": number // 2, "split": split}
        place = {"width": 64, "height": 160, "source_path": f"{number:04d}.jpg"}
        place |= {"time": taken(number), "tracklet": f"walk {number // 2}"}
        images.append({**common, **place, "camera": f"c{number % 3}", "image": draw_person(number)})
        captions.append({**common, "caption_id": schema.caption_id(image_id, 0), "text": summarize(number)})
        dialogues.append({"image_id": image_id, "turns": [], "summary": summarize(number), "model": "test"})
        dialogues[-1] |= {
            "flags": [],
            "attributes": {"upper_colour": COLOURS[number % len(COLOURS)]} if structured else {},
        }
        dialogues[-1] |= {"prompt_version": "1", "generation_settings": "{}"}
        dialogues[-1] |= {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
    rows = pa.Table.from_pylist(images, pa.schema([*schema.IMAGES, schema.TIME, schema.TRACKLET]))
    version = publish(store, "images", rows, "ingest", {}, {})
    made_from = {"images": version}
    publish(store, "captions", pa.Table.from_pylist(captions, schema.CAPTIONS), "ingest", made_from, {})
    publish(
        store, "dialogues", pa.Table.from_pylist(dialogues, schema.DIALOGUES), "dialogue", made_from, {}, config=asked
    )


def publish_tiny(store: Store, name: str, seed: int) -> tuple[CECA, PublishedModel]:
    torch.manual_seed(seed)
    model = CECA(TINY).eval()
    weights = serialize(model.state_dict())
    return model, publish_model(
        store, name, weights, model=TINY, config={}, training={}, made_from={}, version=f"{name}-1"
    )


@torch.inference_mode()
def publish_gallery(
    store: Store,
    model: CECA,
    published: PublishedModel,
    name: str,
    *,
    split: str = "test",
    number: int = 1,
    leave_out: int = 0,
) -> None:
    images = store.current("images")
    rows = [row for row in store.read(images).to_pylist() if row["split"] == split]
    rows = rows[: len(rows) - leave_out]
    summaries = {row["image_id"]: row["summary"] for row in store.read(store.current("dialogues")).to_pylist()}
    gallery = []
    for row in rows:
        pixels = normalize(torch.from_numpy(decode_image(row["image"], 128, 64).copy())[None])
        parts = model.embed_gallery(pixels, tokenize([summaries[row["image_id"]]]))
        embedded = {key: part[0].half().numpy() for key, part in zip(("global", "local"), parts, strict=True)}
        known = {key: row[key] for key in ("image_id", "identity", "split")}
        gallery.append({**known, **embedded, "model_digest": published.digest})
    table = pa.Table.from_pylist(gallery, schema.gallery(published.global_dim, published.local_dim))
    made_from = {"model": published.digest, "images": images.version, "dialogues": store.current("dialogues").version}
    publish(store, "gallery", table, "index", made_from, {"model": name}, number=number)
