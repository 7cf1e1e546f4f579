"""Demo: draw pedestrians and take them through every stage to three answered searches, on this machine.

    make demo

For the table, a model without summaries (λ = 0, no CAWL) is trained beside CECA with the same seed and steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ceca.config import TrainConfig
from ceca.data.store import Store
from ceca.data.tables import find_captions, find_images, read_texts
from jobs.draw import draw
from jobs.evaluate import evaluate
from jobs.pipeline import pipeline, recipe_config
from jobs.runtime.console import console, entry, print_metrics
from jobs.runtime.ray_session import connect
from jobs.train import train

BASELINE = "no-summaries"


def demo(folder: Path, recipe: str, searches: int = 3) -> dict[str, dict[str, float]]:
    """Run all stages below a folder and print a table of metrics.

    Args:
        folder: where everything is put.
        recipe: name or path of a recipe.
        searches: number of searches to answer.

    Returns:
        The rows of the table.
    """
    from ceca.datasets.drawn import contact_sheet

    started = time.monotonic()
    source, data = folder / "drawn", str(folder / "data")
    draw(str(source), recipe_config(recipe, "draw"))
    contact_sheet(source, folder / "pedestrians.png", rows=2, columns=6)
    connect()
    result = pipeline(data, str(source), recipe)
    settings = recipe_config(recipe, "train")
    train(data, _without_summaries(settings))
    baseline = evaluate(data, recipe_config(recipe, "evaluate", model=BASELINE))
    metrics = result["metrics"]
    rows = {
        "chance": metrics["chance"],
        "without summaries (λ = 0, no CAWL)": baseline["metrics"]["fused"],
        "CECA, global branch alone": metrics["global"],
        "CECA, local branch alone": metrics["local"],
        "CECA": metrics["fused"],
    }
    picture = _answer_searches(Store(data), folder / "searches.png", searches, seed=settings.seed)
    title = (
        f"People never seen in training: {result['queries']} queries, {result['gallery']} images, percent "
        "(summaries by the simulated annotator)"
    )
    print_metrics(title, rows)
    console.print(f"demo: {time.monotonic() - started:.0f} s; the ranked lists are in {picture}")
    console.print("demo: `make serve` opens the search page on this gallery")
    return rows


def _without_summaries(settings: TrainConfig) -> TrainConfig:
    """The same training without summaries."""
    return dataclasses.replace(
        settings,
        name=BASELINE,
        model=dataclasses.replace(settings.model, summary_weight=0.0),
        losses=dataclasses.replace(
            settings.losses, terms=tuple(term for term in settings.losses.terms if term != "cawl")
        ),
    )


def _answer_searches(store: Store, picture: Path, count: int, seed: int) -> Path:
    """Search for people of the test split with their captions, and draw the ranked lists."""
    from ceca.report.figures import draw_ranked_lists
    from ceca.search.catalogue import Catalogue
    from ceca.search.searcher import Searcher
    from jobs.reports.hits import ranked_list

    images = store.current("images", "ingest")
    pairs = find_captions(store, find_images(store, images, "test"), store.captions(images))
    chosen = np.random.default_rng(seed).choice(len(pairs), size=min(count, len(pairs)), replace=False)
    asked = pairs.take(np.sort(chosen))
    queries = itertools.chain.from_iterable(read_texts(store, asked.captions, asked.rows, "text"))
    searcher = Searcher(store)
    catalogue = Catalogue(searcher.edition)
    lists = []
    for query, identity in zip(queries, asked.identities.tolist(), strict=True):
        hits = searcher.search(query, omega=0.3, top_k=8)
        ranks = [rank for rank, hit in enumerate(hits, 1) if hit.identity == identity]
        console.print(f"search: “{query}” → right at rank {', '.join(map(str, ranks)) or 'none of 8'}")
        lists.append(ranked_list(catalogue, query, identity, hits))
    return draw_ranked_lists(lists, picture)


def main(argv: list[str] | None = None) -> None:
    def run(
        folder: Annotated[Path, tyro.conf.arg(help="where everything is put")] = Path("demo"),
        recipe: Annotated[str, tyro.conf.arg(help="name or path of a recipe")] = "tiny",
    ) -> None:
        demo(folder, recipe)

    tyro.cli(run, args=argv, prog="ceca demo", description="From drawn pedestrians to answered searches.")


if __name__ == "__main__":
    entry(main)
