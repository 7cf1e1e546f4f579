"""Report: pictures of what a stage has made.

ceca report dialogues --data s3://bucket/cuhk s3://bucket/rstp --picture dialogues.png
ceca report training --data s3://bucket/cuhk --models ceca irra --picture training.png
ceca report omega --data s3://bucket/cuhk --models ceca --picture omega.svg
ceca report significance --data s3://bucket/cuhk --models rde ceca
ceca report ranked --data s3://bucket/cuhk --models rde ceca --picture ranked.png
ceca report attributes --data demo/data --model ceca --picture attributes.png
ceca report statistics --data s3://bucket/cuhk --picture statistics.png
ceca report page --data s3://bucket/cuhk --folder report
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.table import Table as TextTable

from ceca.config import EvaluateConfig, Split
from ceca.data.names import EVALUATIONS
from ceca.data.schema import image_of
from ceca.data.store import Store
from ceca.data.tables import ImageRow, add_summaries, list_images
from ceca.datasets.images import open_image
from ceca.errors import UserError
from ceca.evaluation.significance import Difference, paired_bootstrap
from ceca.metrics import STRIP, RetrievalMetrics, slices
from ceca.model.ceca import fused_similarity
from ceca.model.registry import model_file, require_model
from ceca.model.tokens import CONTEXT, count_tokens
from ceca.report.figures import (
    Described,
    RankedList,
    draw_attributes,
    draw_dialogues,
    draw_omega,
    draw_ranked_lists,
    draw_statistics,
    draw_training,
)
from jobs.evaluate import Embedded, compared, embed_split, rank, result_name
from jobs.runtime.console import console

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
    console.print(f"report: {sum(len(cards) for _, cards in blocks)} images → {picture}")


def report_training(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="published models")] = ("ceca",),
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "training.png"
    ),
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
    console.print(f"report: {len(curves)} models → {picture}")


def report_omega(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="published models, or URIs of some")] = ("ceca",),
    split: Annotated[Split, tyro.conf.arg(help="the split to evaluate")] = "test",
    steps: Annotated[int, tyro.conf.arg(help="ω is 0, 1 and as many between as make so many steps")] = 10,
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path("omega.png"),
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
        console.print(f"report: {name} is best at ω = {best:g}: Rank-1 {rank1:.2f}, Rsum {rsum:.2f}")
    draw_omega(curves, picture)
    console.print(f"report: ω curve → {picture}")
    return curves


def report_significance(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, str], tyro.conf.arg(help="two evaluated models")],
    split: Annotated[Split, tyro.conf.arg(help="the split on which both were evaluated")] = "test",
    neighbours: Annotated[tuple[int, int], tyro.conf.arg(help="`--neighbours` of the two evaluations")] = (0, 0),
    rerank: Annotated[tuple[int, int], tyro.conf.arg(help="`--rerank` of the two evaluations")] = (0, 0),
) -> dict[str, Difference]:
    """Whether the second of two models is better than the first: a paired bootstrap over the people asked for."""
    store = Store(data)
    tables = []
    for name, near, again in zip(models, neighbours, rerank, strict=True):
        file = f"{result_name(EvaluateConfig(split=split, neighbours=near, rerank=again))}.queries.parquet"
        place = (EVALUATIONS, require_model(store, name).digest, file)
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
    console.print(shown)
    return found


def report_ranked(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="one or two published models")] = ("ceca",),
    split: Annotated[Split, tyro.conf.arg(help="the split to search")] = "test",
    omega: Annotated[float, tyro.conf.arg(help="share of the local similarity, 0 to 1")] = 0.3,
    count: Annotated[int, tyro.conf.arg(help="sentences")] = 4,
    top_k: Annotated[int, tyro.conf.arg(help="images of each list")] = 8,
    seed: Annotated[int, tyro.conf.arg(help="chooses the sentences")] = 0,
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "ranked.png"
    ),
) -> list[RankedList]:
    """Ranked lists of two models one above the other for the same sentences, hits framed."""
    if not 1 <= len(models) <= 2 or count < 1 or top_k < 1:
        raise UserError(f"--models takes one or two, --count and --top-k at least 1; found {models}, {count}, {top_k}")
    store = Store(data)
    tables = [embed_split(store, EvaluateConfig(model=name, split=split)) for name in models]
    sides = [compared(EvaluateConfig(), *both) for both in tables]
    queries, texts = tables[0][0], sides[0][0]
    # By the first places: sentences that exactly one model answers right come first, in a random order.
    right = [there.identities[_best(asked, there, omega, 1)[:, 0]] == asked.identities for asked, there in sides]
    shuffled = np.random.default_rng(seed).permutation(len(texts.identities))
    chosen = shuffled[np.argsort(right[0][shuffled] == right[-1][shuffled], kind="stable")][:count]
    captions = store.read(store.current("captions", "ingest"), ["caption_id", "text"])
    words = dict(zip(captions["caption_id"].to_pylist(), captions["text"].to_pylist(), strict=True))
    table = store.current("images", "ingest")
    places = {row.image_id: (row.part, row.row) for row in list_images(store, table, split)}
    lists = []
    for query in sorted(chosen.tolist()):
        # Each model has a gallery of its own: one without summaries also embeds images that nobody was asked about.
        for name, (asked, there), (_, gallery) in zip(models, sides, tables, strict=True):
            best = _best(asked, there, omega, top_k, slice(query, query + 1))[0]
            ids = gallery["image_id"].take(best).to_pylist()
            encoded = store.take(table, [places[image_id] for image_id in ids], ["image"])["image"].to_pylist()
            lists.append(
                RankedList(
                    words[queries["caption_id"][query].as_py()],
                    int(texts.identities[query]),
                    [open_image(content) for content in encoded],
                    there.identities[best].tolist(),
                    name if len(models) > 1 else "",
                )
            )
    draw_ranked_lists(lists, picture)
    console.print(f"report: {count} sentences → {picture}")
    return lists


def _best(texts: Embedded, images: Embedded, omega: float, top_k: int, rows: slice | None = None) -> np.ndarray:
    """Gallery columns of the best images of some queries (default: all), [q, k]."""
    found = []
    start, stop, _ = (rows or slice(None)).indices(len(texts.identities))
    for part in slices(stop - start, max(1, STRIP // len(images.identities))):
        side = slice(start + part.start, start + part.stop)
        similarity = fused_similarity((texts.pair[0][side], texts.pair[1][side]), images.pair, omega)
        found.append(similarity.topk(min(top_k, similarity.shape[1]), dim=1).indices.numpy())
    return np.concatenate(found)


def report_attributes(
    data: Annotated[str, tyro.conf.arg(help="URI of a dataset of drawn pedestrians, whose truth is known")],
    model: Annotated[str, tyro.conf.arg(help="a published model, or the URI of one")] = "ceca",
    split: Annotated[Split, tyro.conf.arg(help="the split to search")] = "test",
    omega: Annotated[float, tyro.conf.arg(help="share of the local similarity, 0 to 1")] = 0.3,
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "attributes.png"
    ),
) -> dict[str, tuple[float, float]]:
    """Which attributes a model's wrong first places get wrong, beside those of any stranger; Rank-1 by view."""
    store = Store(data)
    truth = store.manifest("attributes")
    if truth is None:
        raise UserError(f"{store.uri} has no table of attributes: this report is for drawn pedestrians")
    queries, gallery = embed_split(store, EvaluateConfig(model=model, split=split))
    texts, images = compared(EvaluateConfig(), queries, gallery)
    drawn = {row["image_id"]: {**row, "attributes": dict(row["attributes"])} for row in store.read(truth).to_pylist()}
    asked = [drawn[image_of(caption_id)] for caption_id in queries["caption_id"].to_pylist()]
    there = [drawn[image_id] for image_id in gallery["image_id"].to_pylist()]
    first = _best(texts, images, omega, 1)[:, 0]
    right = images.identities[first] == texts.identities
    stranger = np.random.default_rng(0).integers(len(there), size=len(asked))
    other = images.identities[stranger] != texts.identities
    names = sorted({name for row in there for name in row["attributes"]})
    confused = {}
    for name in names:
        wanted, has = (np.array([row["attributes"].get(name, "") for row in rows]) for rows in (asked, there))
        differs = [wanted != has[found] for found in (first, stranger)]
        confused[name] = (float(differs[0][~right].mean()) if (~right).any() else 0.0, float(differs[1][other].mean()))
    rank1 = {}
    for kind, column in (("view", "view"), ("light", "lighting"), ("hidden in part", "occluded")):
        values = np.array([str(row[column]).lower() for row in asked])
        for value in sorted(set(values.tolist())):
            rank1[f"{kind}: {value}"] = (100 * float(right[values == value].mean()), int((values == value).sum()))
    draw_attributes(confused, rank1, picture)
    console.print(f"report: {(~right).sum()} of {len(right)} first places are wrong → {picture}")
    return confused


def report_statistics(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "statistics.png"
    ),
) -> dict[str, list[int]]:
    """People, images and captions of each split; how long captions and summaries are."""
    store = Store(data)
    tables = [
        store.read(store.current(name, "ingest"), columns)
        for name, columns in (("images", ["identity", "split"]), ("captions", ["split", "text"]))
    ]
    images, captions = (table.to_pydict() for table in tables)
    people = Counter(images["identity"])
    words = [len(text.split()) for text in captions["text"]]
    dialogues = store.manifest("dialogues")
    tokens: list[int] = []
    if dialogues is not None and dialogues.rows:
        tokens = [count_tokens(text) for text in store.read(dialogues, ["summary"])["summary"].to_pylist()]
    draw_statistics(list(people.values()), words, tokens, CONTEXT, picture)
    shown = TextTable(title=store.uri, title_justify="left")
    for heading in ("split", "people", "images", "captions"):
        shown.add_column(heading, justify="right" if heading != "split" else "left")
    counts = {}
    for split in dict.fromkeys(images["split"]):
        own = [identity for identity, found in zip(images["identity"], images["split"], strict=True) if found == split]
        counts[split] = [len(set(own)), len(own), captions["split"].count(split)]
        shown.add_row(split, *(f"{number:,}" for number in counts[split]))
    console.print(shown)
    return counts


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
