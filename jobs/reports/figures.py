"""Report: figures of a dataset and its models, one function each.

ceca report dialogues --data s3://bucket/cuhk s3://bucket/rstp --picture dialogues.png
ceca report training --data s3://bucket/cuhk --models ceca irra --picture training.png
ceca report omega --data s3://bucket/cuhk --models ceca --picture omega.svg
ceca report confidence --data s3://bucket/cuhk --models ceca --picture confidence.svg
ceca report significance --data s3://bucket/cuhk --models rde ceca
ceca report ranked --data s3://bucket/cuhk --models rde ceca --picture ranked.png
ceca report attributes --data demo/data --model ceca --picture attributes.png
ceca report statistics --data s3://bucket/cuhk --picture statistics.png
ceca report page --data s3://bucket/cuhk --folder report

The functions are also the commands: their parameters are the options. Models, Ray and the drawing library are
imported when a figure is made.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro

from ceca.config import EvaluateConfig, Split
from ceca.data.keys import spelled
from ceca.data.names import EVALUATIONS
from ceca.data.parts import decode
from ceca.data.schema import image_of
from ceca.data.store import Store
from ceca.data.tables import ImageRow, find_dialogues, find_images, list_images
from ceca.datasets.images import open_image
from ceca.errors import UserError
from ceca.evaluation.significance import COMPARED, Difference, compare_runs
from ceca.model.registry import PublishedModel, model_file, require_model
from ceca.model.tokens import CONTEXT
from ceca.report.records import Described, RankedList
from jobs.runtime.console import console, text_table

OMEGA_HELP = "share of the local similarity, 0 to 1; default: that of the model's protocol"


def report_dialogues(
    data: Annotated[tuple[str, ...], tyro.conf.arg(help="dataset URIs; each gets a block of the picture")],
    picture: Annotated[Path, tyro.conf.arg(help="where to write it (.png, .jpg, .webp)")] = Path("dialogues.png"),
    count: Annotated[int, tyro.conf.arg(help="images of each dataset, of different people")] = 6,
    seed: Annotated[int, tyro.conf.arg(help="chooses the images")] = 0,
) -> None:
    """Images with their caption and summary."""
    from ceca.report.figures import draw_dialogues

    if count < 1 or not data:
        raise UserError(f"--count must be at least 1 and --data name a dataset, found {count} and {data}")
    blocks = [(_last_name(uri), describe(Store(uri), count, seed)) for uri in data]
    draw_dialogues(blocks, picture)
    console.print(f"report: {sum(len(cards) for _, cards in blocks)} images → {picture}")


def report_training(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="published models")] = ("ceca",),
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "training.png"
    ),
) -> None:
    """Loss by step and validation by epoch of published models."""
    from ceca.report.figures import draw_training

    store = Store(data)
    curves, validation = {}, {}
    for name in models:
        model = require_model(store, name)
        if "history" not in model.training:
            raise UserError(f"model {name!r} was imported and not trained here, so it has no curve; name others")
        label = model.label(name)
        curves[label], validation[label] = training_curve(model, model_file(store, name, "curve.parquet"))
    draw_training(curves, validation, picture)
    console.print(f"report: {', '.join(curves)} → {picture}")


def training_curve(model: PublishedModel, content: bytes) -> tuple[dict[str, Any], tuple[list[int], list[float]]]:
    """What `draw_training` draws of a model.

    Args:
        model: the model.
        content: its object curve.parquet.

    Returns:
        Columns of the curve; epochs and Rank-1 on the validation split.
    """
    validated = [record for record in model.training.get("history", []) if "val_rank1" in record]
    validation = [record["epoch"] for record in validated], [record["val_rank1"] for record in validated]
    return decode(pa.BufferReader(content)).to_pydict(), validation


def report_omega(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="names or URIs of published models")] = ("ceca",),
    split: Annotated[Split, tyro.conf.arg(help="the split to evaluate")] = "test",
    steps: Annotated[int, tyro.conf.arg(help="number of equal steps of ω from 0 to 1")] = 10,
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path("omega.png"),
) -> dict[str, dict[float, tuple[float, float]]]:
    """Rank-1 and Rsum by ω, from one pass over each model's embeddings."""
    from ceca.evaluation.evaluation import embedded_sides
    from ceca.metrics import RetrievalMetrics
    from ceca.report.figures import draw_omega
    from jobs.evaluations.embedding import embed_split
    from jobs.evaluations.ranking import rank

    if steps < 1 or not models:
        raise UserError(f"--steps must be at least 1 and --models name one, found {steps} and {list(models)}")
    curves = {}
    for name in models:
        label = require_model(Store(data), name).label(name)
        config = EvaluateConfig(model=name, split=split)
        texts, images = embedded_sides(config, *embed_split(Store(data), config))
        by_omega = rank(texts, images, [step / steps for step in range(steps + 1)])
        metrics = {omega: RetrievalMetrics.of(per_query) for omega, per_query in by_omega.items()}
        curves[label] = {omega: (means.rank1, means.rsum) for omega, means in metrics.items()}
        best, (rank1, rsum) = max(curves[label].items(), key=lambda point: point[1])
        console.print(f"report: {label} is best at ω = {best:g}: Rank-1 {rank1:.2f}, Rsum {rsum:.2f}")
    draw_omega(curves, picture)
    console.print(f"report: ω curve → {picture}")
    return curves


def report_confidence(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="evaluated models")] = ("ceca",),
    split: Annotated[Split, tyro.conf.arg(help="the split on which they were evaluated")] = "test",
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "confidence.png"
    ),
) -> dict[str, dict[str, Any]]:
    """Whether confidence can be believed, and false alarms about people who are not there."""
    from ceca.evaluation.open_set import Trials, alarm_curve
    from ceca.metrics import PER_QUERY
    from ceca.report.figures import draw_reliability

    store = Store(data)
    found, bins, curves = {}, {}, {}
    for name in models:
        model = require_model(store, name)
        result = store.read_json(EVALUATIONS, model.digest, f"{split}.json") or {}
        if "open_set" not in result:
            raise UserError(f"{name} has no open-set figures; run `ceca evaluate --model {name} --split {split}` first")
        content = store.read_bytes(EVALUATIONS, model.digest, f"{split}.queries.parquet")
        table = decode(pa.BufferReader(content), [f"fused_{figure}" for figure in PER_QUERY])
        trials = Trials.of(np.column_stack([column.to_numpy() for column in table.columns]))
        label = model.label(name)
        found[label], curves[label] = result["open_set"], alarm_curve(trials)
        if "confidence" in result["open_set"]:
            bins[label] = result["open_set"]["confidence"]["reliability"]
    draw_reliability(bins, curves, picture)
    console.print(f"report: {', '.join(found)} → {picture}")
    return found


def report_significance(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, str], tyro.conf.arg(help="two evaluated models")],
    split: Annotated[Split, tyro.conf.arg(help="the split on which both were evaluated")] = "test",
    neighbours: Annotated[tuple[int, int], tyro.conf.arg(help="`--neighbours` of the two evaluations")] = (0, 0),
    rerank: Annotated[tuple[int, int], tyro.conf.arg(help="`--rerank` of the two evaluations")] = (0, 0),
) -> dict[str, Difference]:
    """Whether the second of two models is better: a paired bootstrap over the people described."""
    from ceca.evaluation.evaluation import result_name

    store = Store(data)
    tables = []
    for name, near, again in zip(models, neighbours, rerank, strict=True):
        file = f"{result_name(EvaluateConfig(split=split, neighbours=near, rerank=again))}.queries.parquet"
        place = (EVALUATIONS, require_model(store, name).digest, file)
        try:
            tables.append(decode(pa.BufferReader(store.read_bytes(*place))).sort_by("caption_id"))
        except FileNotFoundError:
            raise UserError(f"{store.place(*place)} is not there; run `ceca evaluate --model {name}` first") from None
    first, second = tables
    if first["caption_id"] != second["caption_id"]:
        raise UserError(f"{models[0]} and {models[1]} were evaluated on other queries; run `ceca evaluate` for both")
    differences = compare_runs(first, second)
    labels = [require_model(store, name).label(name) for name in models]
    title = f"{labels[1]} minus {labels[0]} on {split}, {first.num_rows:,} queries"
    shown = text_table(title, "", "difference", "95 % interval", "p")
    for label in COMPARED:
        shown.add_row(label, *differences[label].cells())
    console.print(shown)
    return differences


def report_ranked(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="one or two published models")] = ("ceca",),
    split: Annotated[Split, tyro.conf.arg(help="the split to search")] = "test",
    omega: Annotated[float | None, tyro.conf.arg(help=OMEGA_HELP)] = None,
    count: Annotated[int, tyro.conf.arg(help="number of sentences")] = 4,
    top_k: Annotated[int, tyro.conf.arg(help="images of each list")] = 8,
    seed: Annotated[int, tyro.conf.arg(help="chooses the sentences")] = 0,
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "ranked.png"
    ),
) -> list[RankedList]:
    """Ranked lists of one or two models for the same sentences; hits are framed."""
    from ceca.evaluation.evaluation import best_images, choose_queries, embedded_sides
    from ceca.report.figures import draw_ranked_lists
    from jobs.evaluations.embedding import embed_split

    if not 1 <= len(models) <= 2 or count < 1 or top_k < 1:
        raise UserError(f"--models takes one or two, --count and --top-k at least 1; found {models}, {count}, {top_k}")
    store = Store(data)
    tables = [embed_split(store, EvaluateConfig(model=name, split=split)) for name in models]
    sides = [embedded_sides(EvaluateConfig(), *both) for both in tables]
    published = [require_model(store, name) for name in models]
    omegas = [model.omega(omega) for model in published]
    labels = [
        model.label(name) if len(models) > 1 else model.label("") for model, name in zip(published, models, strict=True)
    ]
    right = [
        images.identities[best_images(texts, images, of_model, 1).positions[:, 0]] == texts.identities
        for (texts, images), of_model in zip(sides, omegas, strict=True)
    ]
    images_table = store.current("images", "ingest")
    captions = store.read(store.captions(images_table), ["caption_id", "text"])
    words = dict(zip(captions["caption_id"].to_pylist(), captions["text"].to_pylist(), strict=True))
    in_split = find_images(store, images_table, split)
    places = dict(zip(spelled(in_split.keys), images_table.places(in_split.rows), strict=True))
    lists = []
    for query in choose_queries((right[0], right[-1]), count, seed):
        # Each model has its own gallery: a model without summaries also embeds images without a dialogue.
        for label, of_model, (texts, images), (queries, gallery) in zip(labels, omegas, sides, tables, strict=True):
            best = best_images(texts, images, of_model, top_k, slice(query, query + 1)).positions[0]
            ids = gallery["image_id"].take(best).to_pylist()
            encoded = store.take(images_table, [places[image_id] for image_id in ids], ["image"])["image"].to_pylist()
            lists.append(
                RankedList(
                    words[queries["caption_id"][query].as_py()],
                    int(texts.identities[query]),
                    [open_image(content) for content in encoded],
                    images.identities[best].tolist(),
                    label.strip(),
                )
            )
    draw_ranked_lists(lists, picture)
    console.print(f"report: {count} sentences → {picture}")
    return lists


def report_attributes(
    data: Annotated[str, tyro.conf.arg(help="URI of a dataset of drawn pedestrians: their attributes are known")],
    model: Annotated[str, tyro.conf.arg(help="name or URI of a published model")] = "ceca",
    split: Annotated[Split, tyro.conf.arg(help="the split to search")] = "test",
    omega: Annotated[float | None, tyro.conf.arg(help=OMEGA_HELP)] = None,
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "attributes.png"
    ),
) -> dict[str, tuple[float, float]]:
    """Attributes in which wrong first places differ from the person described, and Rank-1 by view."""
    from ceca.evaluation.attributes import attribute_errors
    from ceca.evaluation.evaluation import best_images, embedded_sides
    from ceca.report.figures import draw_attributes
    from jobs.evaluations.embedding import embed_split

    store = Store(data)
    truth = store.belonging("attributes", store.current("images", "ingest"))
    if truth is None:
        raise UserError(f"{store.uri} has no table of attributes of its images: this report is for drawn pedestrians")
    queries, gallery = embed_split(store, EvaluateConfig(model=model, split=split))
    texts, images = embedded_sides(EvaluateConfig(), queries, gallery)
    published = require_model(store, model)
    drawn = {row["image_id"]: {**row, "attributes": dict(row["attributes"])} for row in store.read(truth).to_pylist()}
    errors = attribute_errors(
        [drawn[image_of(caption_id)] for caption_id in queries["caption_id"].to_pylist()],
        [drawn[image_id] for image_id in gallery["image_id"].to_pylist()],
        texts.identities,
        images.identities,
        best_images(texts, images, published.omega(omega), 1).positions[:, 0],
    )
    draw_attributes(errors.confused, errors.rank1, picture, published.label("").strip())
    console.print(f"report: {errors.wrong} of {errors.queries} first places are wrong → {picture}")
    return errors.confused


def report_statistics(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    picture: Annotated[Path, tyro.conf.arg(help="where to write it; without a suffix PNG and SVG")] = Path(
        "statistics.png"
    ),
) -> dict[str, list[int]]:
    """People, images and captions of each split; lengths of captions and summaries."""
    from ceca.evaluation.statistics import read_statistics
    from ceca.report.figures import draw_statistics

    store = Store(data)
    statistics = read_statistics(store)
    draw_statistics(statistics.images_of_person, statistics.caption_words, statistics.summary_tokens, CONTEXT, picture)
    shown = text_table(store.uri, "split", "people", "images", "captions", left="split")
    for split, size in statistics.splits.items():
        shown.add_row(split, *(f"{number:,}" for number in size))
    console.print(shown)
    return {split: list(size) for split, size in statistics.splits.items()}


def describe(store: Store, count: int, seed: int) -> list[Described]:
    """Images of different people with a caption and the summary.

    Args:
        store: the dataset.
        count: number of images.
        seed: chooses the images.
    """
    images = store.current("images", "ingest")
    captions = store.captions(images)
    described, _ = find_dialogues(store, find_images(store, images), store.current("dialogues", "dialogue"))
    rows = list_images(store, described)
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


def _last_name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]
