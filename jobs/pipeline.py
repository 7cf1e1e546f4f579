"""Pipeline: all stages in order, from a published layout on disk to a gallery that can be searched.

    python jobs/pipeline.py --source CUHK-PEDES --data s3://bucket/cuhk --recipe cuhk_pedes

Published tables are not made again, so the same command continues a pipeline that was stopped anywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro

from ceca.commandline import load_recipe
from ceca.config import STAGES, EvaluateConfig
from ceca.data.names import EVALUATIONS
from ceca.data.store import Store
from ceca.data.tables import find_images
from ceca.model.registry import require_model
from ceca.search.confidence import CALIBRATED_ON
from ceca.settings import from_mapping
from jobs.dialogue import dialogue
from jobs.evaluate import evaluate
from jobs.index import index
from jobs.ingest import ingest
from jobs.runtime.alone import alone
from jobs.runtime.console import entry
from jobs.train import train


def recipe_config(recipe: str, stage: str, **overrides: Any) -> Any:
    """A stage's configuration from a recipe, with some values replaced."""
    settings: Any = from_mapping(STAGES[stage], load_recipe(recipe).get(stage) or {}, f"recipe {recipe}: {stage}")
    return dataclasses.replace(settings, **overrides)


def pipeline(data: str, source: str, recipe: str, name: str = "ceca") -> dict[str, Any]:
    """Run ingest, dialogue, train, evaluate (of the validation split, too) and index.

    Args:
        data: dataset URI.
        source: folder or URI with the annotation file and imgs/.
        recipe: name or path of a recipe.
        name: the model's name below the dataset URI.

    Returns:
        The result of the evaluation.
    """
    # All settings are read first, so that a mistake in the recipe is reported before anything is computed.
    named = {
        "ingest": {"source": source},
        "train": {"name": name},
        "evaluate": {"model": name},
        "index": {"model": name},
    }
    settings = {
        stage: recipe_config(recipe, stage, **named.get(stage, {}))
        for stage in ("ingest", "dialogue", "train", "evaluate", "index")
    }
    with alone(Store(data), f"pipeline-{name}"):
        ingest(data, settings["ingest"])
        dialogue(data, settings["dialogue"])
        train(data, settings["train"])
        _calibrate(data, settings["evaluate"])
        result = evaluate(data, settings["evaluate"])
        index(data, settings["index"])
    return result


def _calibrate(data: str, config: EvaluateConfig) -> None:
    """Evaluate the validation split, where there is one: searches then know their confidence.

    Where the asked split has been evaluated already, nothing is done.
    """
    store = Store(data)
    evaluated = store.path(EVALUATIONS, require_model(store, config.model).digest, f"{config.split}.json")
    if store.fs.exists(evaluated):
        return
    images = store.current("images", "ingest")
    if config.split != CALIBRATED_ON and len(find_images(store, images, CALIBRATED_ON)):
        evaluate(data, dataclasses.replace(config, split=CALIBRATED_ON))


def main(argv: list[str] | None = None) -> None:
    def run(
        data: Annotated[str, tyro.conf.arg(help="dataset URI: a folder, file://… or s3://bucket/prefix")],
        source: Annotated[str, tyro.conf.arg(help="folder or URI with the annotation file and imgs/")],
        recipe: Annotated[str, tyro.conf.arg(help="name or path of a recipe")],
        name: Annotated[str, tyro.conf.arg(help="the model's name below the dataset URI")] = "ceca",
    ) -> None:
        pipeline(data, source, recipe, name)

    tyro.cli(run, args=argv, prog="pipeline", description="All stages: ingest, dialogue, train, evaluate, index.")


if __name__ == "__main__":
    entry(main)
