"""Compare: train several methods on one dataset with several seeds each, and print their table.

    ceca compare --data s3://bucket/cuhk --recipe cuhk_pedes --methods clip irra rde ceca agreement --seeds 3

A method is a recipe below ceca/recipes/methods, or a YAML file. It is combined with the benchmark's recipe and trained
as `<method>-<seed>`. A method without training settings takes the models of `ceca`. Published models are not trained
again, so the same command continues, and more methods or seeds can be added.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.text import Text

from ceca.commandline import load_recipe
from ceca.config import EvaluateConfig, Protocol, Split, TrainConfig
from ceca.data.names import COMPARISONS
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.evaluation.names import METRICS
from ceca.settings import from_mapping, to_mapping
from jobs.evaluate import evaluate
from jobs.runtime.console import console, entry, text_table
from jobs.runtime.ray_session import connect
from jobs.train import train

# Published figures on the test splits (method: Retrieval and evaluation): Rank-1, and mAP if it is known.
PUBLISHED: dict[str, dict[str, tuple[float, float | None]]] = {
    "cuhk_pedes": {"clip": (68.19, None), "irra": (73.38, 66.13), "rde": (75.94, 67.56), "ceca": (78.30, 65.9)},
    "icfg_pedes": {"clip": (56.74, None), "irra": (63.46, 38.05), "rde": (67.68, 40.06), "ceca": (72.25, None)},
    "rstpreid": {"clip": (54.05, None), "irra": (60.20, 47.17), "rde": (65.35, 50.88), "ceca": (71.40, None)},
}


def compare(
    data: Annotated[str, tyro.conf.arg(help="dataset URI: a folder, file://… or s3://bucket/prefix")],
    recipe: Annotated[str, tyro.conf.arg(help="the benchmark's recipe, or several joined by +")],
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help="recipes of methods, the rows of the table")] = (
        "clip",
        "irra",
        "rde",
        "ceca",
        "agreement",
    ),
    seeds: Annotated[int, tyro.conf.arg(help="runs of each method, with seeds from 0")] = 3,
    split: Annotated[Split, tyro.conf.arg(help="the split to compare on")] = "test",
    protocol: Annotated[
        Protocol | None, tyro.conf.arg(help="how epochs are chosen; default: as the recipes say")
    ] = None,
    picture: Annotated[Path | None, tyro.conf.arg(help="also draw the table (.png, .webp)")] = None,
) -> dict[str, Any]:
    """Train methods on a dataset, several seeds each, and print their table: mean ± deviation, percent."""
    if seeds < 1 or not methods:
        raise UserError(f"--seeds must be at least 1 and --methods name one, found {seeds} and {list(methods)}")
    runs = [plan(method, recipe, seed, split, protocol) for method in methods for seed in range(seeds)]  # typos first
    connect()
    results: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    made: dict[str, dict[str, Any]] = {}
    for number, (method, training, evaluation) in enumerate(runs, 1):
        console.print(f"compare: {training.name} ({number} of {len(runs)})")
        train(data, training)
        found = evaluate(data, evaluation)
        results[method].append(found["metrics"].get("reranked", found["metrics"]["fused"]))
        made[method] = {
            "recipe": f"{method}+{recipe}",
            "protocol": found["protocol"],
            "omega": found["omega"],
            "train": to_mapping(training, results_only=True),
        }
    store = Store(data)
    rows = {method: summarise(of_seeds) for method, of_seeds in results.items()}
    comparison = {
        "recipe": recipe, "split": split, "seeds": seeds, "made": made, "methods": results, "summary": rows
    }  # fmt: skip
    name = recipe.replace("/", "_") + ("-released" if protocol == "released" else "")
    store.write_json(comparison, COMPARISONS, f"{name}.json")
    print_comparison(comparison)
    if picture is not None:
        from ceca.report.figures import draw_comparison

        draw_comparison(labelled(comparison), picture)
        console.print(f"compare: → {picture}")
    return comparison


class PlannedRun(NamedTuple):
    """The training and the evaluation of one method with one seed."""

    method: str
    training: TrainConfig
    evaluation: EvaluateConfig


def plan(method: str, recipe: str, seed: int, split: Split, protocol: Protocol | None = None) -> PlannedRun:
    """Combine a method's recipe with the benchmark's. Models of a protocol that is asked for have their own names."""
    if "dialogue" in load_recipe(method):
        raise UserError(
            f"method {method} is another way of making dialogues, and compare takes those that are there: run "
            f"`ceca dialogue --recipe {method}+{recipe}` on a dataset of its own, and compare `ceca` there"
        )
    sections = load_recipe(f"{method}+{recipe}")
    training: TrainConfig = from_mapping(TrainConfig, sections.get("train", {}), f"recipe {method}+{recipe}: train")
    name = Path(method).stem if "train" in load_recipe(method) else "ceca"
    if protocol is not None and protocol != training.protocol:
        training, name = dataclasses.replace(training, protocol=protocol), f"{name}-{protocol}"
    name = f"{name}-{seed}"
    evaluation = from_mapping(EvaluateConfig, {**sections.get("evaluate", {}), "model": name, "split": split})
    return PlannedRun(method, dataclasses.replace(training, name=name, seed=seed), evaluation)


def summarise(results: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of each metric; the deviation of a single result is 0."""
    return {
        key: (
            statistics.mean(result[key] for result in results),
            statistics.stdev(result[key] for result in results) if len(results) > 1 else 0.0,
        )
        for key in METRICS
    }


def labelled(comparison: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """The summary with each method's protocol beside its name, unless it is `validation`."""
    made = comparison.get("made", {})  # comparisons before 0.2 have none
    found = {}
    for method, row in comparison["summary"].items():
        protocol = made.get(method, {}).get("protocol", "validation")
        found[Path(method).stem + ("" if protocol == "validation" else f" (protocol {protocol})")] = row
    return found


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print a row per method with its recipe and protocol; the best figure of each column is bold."""
    recipe, rows = comparison["recipe"], comparison["summary"]
    title = f"{recipe}, split {comparison['split']}, {comparison['seeds']} seeds: mean ± deviation, percent"
    table = text_table(title, "method", "recipe", "protocol", *METRICS.values(), left="method")
    published = PUBLISHED.get(recipe.split("+")[0], {})
    if published:
        table.add_column("published Rank-1 (mAP)", justify="right")
    best = {key: max(row[key][0] for row in rows.values()) for key in METRICS}
    for method, row in rows.items():
        cells = [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in row.values()]
        marked = [
            Text(cell, "bold" if row[key][0] == best[key] else "") for key, cell in zip(METRICS, cells, strict=True)
        ]
        known = published.get(method)
        words = [f"{known[0]:.2f} ({known[1] or '–'})" if known else ""] if published else []
        made = comparison["made"][method]
        short = "+".join(Path(part).stem for part in made["recipe"].split("+"))
        table.add_row(Path(method).stem, short, f"{made['protocol']}, ω {made['omega']:g}", *marked, *words)
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    tyro.cli(compare, args=argv, prog="ceca compare")


if __name__ == "__main__":
    entry(main)
