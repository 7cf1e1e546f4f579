"""Report: pictures of what a stage has made.

ceca report dialogues --data s3://bucket/cuhk s3://bucket/rstp --picture dialogues.png
ceca report training --data s3://bucket/cuhk --models ceca irra --picture training.png
ceca report omega --data s3://bucket/cuhk --models ceca --picture omega.svg
ceca report significance --data s3://bucket/cuhk --models rde ceca
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.table import Table as TextTable

from ceca.config import EvaluateConfig, Split
from ceca.datasets.images import open_image
from ceca.errors import UserError
from ceca.metrics import RetrievalMetrics
from ceca.model.weights import model_file, require_model
from ceca.report import Described, draw_dialogues, draw_omega, draw_training
from ceca.samples import ImageRow, add_summaries, list_images
from ceca.significance import Difference, paired_bootstrap
from ceca.store import Store
from jobs import stages
from jobs.evaluate import compared, embed_split, rank, result_name

# What of a query is compared between runs, by its column.
COMPARED = {"Rank-1": "rank1", "Rank-5": "rank5", "Rank-10": "rank10", "AP": "average_precision"}


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


def report_omega(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="published models, or URIs of some")] = ("ceca",),
    split: Annotated[Split, tyro.conf.arg(help="the split to evaluate")] = "test",
    steps: Annotated[int, tyro.conf.arg(help="ω is 0, 1 and as many between as make so many steps")] = 10,
    picture: Annotated[Path, tyro.conf.arg(help="where to write it (.png, .svg, .webp)")] = Path("omega.png"),
) -> dict[str, dict[float, tuple[float, float]]]:
    """How Rank-1 and Rsum follow ω, from one pass over each model's embeddings."""
    if steps < 1 or not models:
        raise UserError(f"--steps must be at least 1 and --models name one, found {steps} and {list(models)}")
    curves = {}
    for name in models:
        config = EvaluateConfig(model=name, split=split)
        texts, images = compared(config, *embed_split(Store(data), config))
        found = rank(texts, images, [step / steps for step in range(steps + 1)])
        metrics = {omega: RetrievalMetrics.of(per_query) for omega, per_query in found.items()}
        curves[name] = {omega: (made.rank1, made.rsum) for omega, made in metrics.items()}
        best, (rank1, rsum) = max(curves[name].items(), key=lambda point: point[1])
        stages.console.print(f"report: {name} is best at ω = {best:g}: Rank-1 {rank1:.2f}, Rsum {rsum:.2f}")
    draw_omega(curves, picture)
    stages.console.print(f"report: ω curve → {picture}")
    return curves


def report_significance(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, str], tyro.conf.arg(help="two evaluated models")],
    split: Annotated[Split, tyro.conf.arg(help="the split on which both were evaluated")] = "test",
    neighbours: Annotated[tuple[int, int], tyro.conf.arg(help="`--neighbours` of the two evaluations")] = (0, 0),
) -> dict[str, Difference]:
    """Whether the second of two models is better than the first: a paired bootstrap over the people asked for."""
    store = Store(data)
    tables = []
    for name, near in zip(models, neighbours, strict=True):
        file = f"{result_name(EvaluateConfig(split=split, neighbours=near))}.queries.parquet"
        place = ("evaluations", require_model(store, name).digest, file)
        try:
            tables.append(pq.read_table(pa.BufferReader(store.read_bytes(*place))).sort_by("caption_id"))
        except FileNotFoundError:
            raise UserError(f"{store.place(*place)} is not there; run `ceca evaluate --model {name}` first") from None
    first, second = tables
    if first["caption_id"] != second["caption_id"]:
        raise UserError(f"{models[0]} and {models[1]} were evaluated on other queries; run `ceca evaluate` for both")
    people = first["identity"].to_numpy()
    shown = TextTable(title=f"{models[1]} minus {models[0]} on {split}, {len(people):,} queries", title_justify="left")
    for heading in ("", "difference", "95 % interval", "p"):
        shown.add_column(heading, justify="right" if heading else "left")
    found = {}
    for label, column in COMPARED.items():
        before, after = (100 * table[f"fused_{column}"].to_numpy() for table in tables)
        found[label] = paired_bootstrap(before, after, people)
        made = found[label]
        shown.add_row(label, f"{made.mean:+.2f}", f"{made.low:+.2f} … {made.high:+.2f}", f"{made.p:.4f}")
    stages.console.print(shown)
    return found


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
    kinds: dict[str, Any] = {
        "dialogues": report_dialogues,
        "training": report_training,
        "omega": report_omega,
        "significance": report_significance,
    }
    tyro.extras.subcommand_cli_from_dict(kinds, args=argv, prog="ceca report", description="Look at what a stage made.")


if __name__ == "__main__":
    stages.entry(main)
