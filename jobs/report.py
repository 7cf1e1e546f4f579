"""Report: pictures of what a stage has made.

ceca report dialogues --data s3://bucket/cuhk s3://bucket/rstp --picture dialogues.png
ceca report training --data s3://bucket/cuhk --models ceca irra --picture training.png
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from ceca.datasets.images import open_image
from ceca.errors import UserError
from ceca.model.weights import model_file, require_model
from ceca.report import Described, draw_dialogues, draw_training
from ceca.samples import ImageRow, add_summaries, list_images
from ceca.store import Store
from jobs import stages


def report_dialogues(
    data: Annotated[tuple[str, ...], tyro.conf.arg(help="dataset URIs; each gets a block of the picture")],
    picture: Annotated[Path, tyro.conf.arg(help="where to write it (.png, .jpg, .webp)")] = Path("dialogues.png"),
    count: Annotated[int, tyro.conf.arg(help="images of each dataset, of different people")] = 6,
    seed: Annotated[int, tyro.conf.arg(help="chooses the images")] = 0,
) -> None:
    """Images with their caption and summary."""
    if count < 1 or not data:
        raise UserError(f"--count must be at least 1 and --data name a dataset, found {count} and {data}")
    blocks = [(_title(uri), describe(Store(uri), count, seed)) for uri in data]
    draw_dialogues(blocks, picture)
    stages.console.print(f"report: {sum(len(cards) for _, cards in blocks)} images → {picture}")


def report_training(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="published models")] = ("ceca",),
    picture: Annotated[Path, tyro.conf.arg(help="where to write it (.png, .jpg, .webp)")] = Path("training.png"),
) -> None:
    """The loss of every step and the validation of published models."""
    store = Store(data)
    curves, validation = {}, {}
    for name in models:
        model = require_model(store, name)
        table = pq.read_table(pa.BufferReader(model_file(store, name, "curve.parquet")))
        curves[name] = table.to_pydict()
        tried = [record for record in model.training["history"] if "val_rank1" in record]
        validation[name] = ([record["epoch"] for record in tried], [record["val_rank1"] for record in tried])
    draw_training(curves, validation, picture)
    stages.console.print(f"report: {len(curves)} models → {picture}")


def describe(store: Store, count: int, seed: int) -> list[Described]:
    """Images of different people with a caption and the summary, chosen by `seed`."""
    images, captions = store.current("images", "ingest"), store.current("captions", "ingest")
    rows, _ = add_summaries(store, list_images(store, images), images, store.current("dialogues", "dialogue"))
    source = random.Random(seed)
    source.shuffle(rows)
    chosen: dict[int, ImageRow] = {}
    for row in rows:
        chosen.setdefault(row.identity, row)
        if len(chosen) == count:
            break
    table = store.read(captions, ["image_id", "text"])
    texts: dict[str, str] = {}
    for image_id, text in zip(table["image_id"].to_pylist(), table["text"].to_pylist(), strict=True):
        texts.setdefault(image_id, text)
    places = [(row.part, row.row) for row in chosen.values()]
    encoded = store.take(images, places, ["image"])["image"].to_pylist()
    return [
        Described(open_image(content), texts.get(row.image_id, ""), row.summary)
        for row, content in zip(chosen.values(), encoded, strict=True)
    ]


def _title(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def main(argv: list[str] | None = None) -> None:
    kinds: dict[str, Any] = {"dialogues": report_dialogues, "training": report_training}
    tyro.extras.subcommand_cli_from_dict(kinds, args=argv, prog="ceca report", description="Look at what a stage made.")


if __name__ == "__main__":
    stages.entry(main)
