"""Two sets in one training against each alone, and a pre-training on a set in which nobody is named.

    python benchmarks/sets.py                    # three sets of 120 drawn people, 4 epochs, 3 seeds
    python benchmarks/sets.py --identities 360 --epochs 10 --height 128

Draws three sets of different people, takes them through ingest and dialogue, and measures every model on the test split
of the first two sets, the last epoch of each. In the third set, all identities are removed. The samples, their order,
the losses and the steps are those of `ceca train`; this process takes them all by itself, without Ray's workers. The
same command continues a run that was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import ray
import torch
import torch.distributed
import tyro

from ceca.config import TrainConfig
from ceca.data.schema import NOBODY
from ceca.data.store import Store
from ceca.model.ceca import CECA
from ceca.model.weights import build_model
from ceca.training.engine import make_engine
from ceca.training.order import Batches
from ceca.training.step import train_step
from jobs.compare import summarise
from jobs.dialogue import dialogue
from jobs.draw import draw
from jobs.ingest import ingest
from jobs.pipeline import recipe_config
from jobs.runtime.console import console, entry, text_table
from jobs.training.data import LoadSamples, Run
from jobs.training.images import InFiles, parts_of
from jobs.training.samples import held_out, training_set
from jobs.training.sets import InputSet, input_sets
from jobs.training.validate import validate

RECIPE = "tiny"
SHOWN = {"rank1": "Rank-1", "rank5": "Rank-5", "mean_average_precision": "mAP"}
CPU = torch.device("cpu")


@dataclasses.dataclass
class Settings:
    """What is compared."""

    identities: int = 120
    """Number of drawn people of each set; four images each."""
    epochs: int = 4
    """Epochs of each training; those that follow a pre-training have one."""
    seeds: int = 3
    """Trainings of each kind, with seeds from 0."""
    soft_labels: float = 0.4
    """`losses.soft_labels` of the pre-training that has them."""
    height: int = 64
    """Height in pixels to which images are resized; they are half as wide."""
    folder: Path = Path("/tmp/ceca-sets")
    """Where everything is put."""


def make_set(settings: Settings, number: int, *, named: bool = True) -> str:
    """Draw a set and take it through ingest and dialogue; returns its URI."""
    folder = settings.folder.absolute()
    drawn, data = folder / f"drawn-{number}", str(folder / f"set-{number}")
    if not drawn.exists():
        draw(str(drawn), recipe_config(RECIPE, "draw", identities=settings.identities, seed=number))
        annotation = drawn / "reid_raw.json"
        if not named:
            records = json.loads(annotation.read_text())
            annotation.write_text(json.dumps([{**record, "id": NOBODY} for record in records]))
    ingest(data, recipe_config(RECIPE, "ingest", source=str(drawn)))
    dialogue(data, recipe_config(RECIPE, "dialogue"))
    return data


def training(
    settings: Settings, seed: int, epochs: int, sets: Sequence[str] = (), soft_labels: float = 0
) -> TrainConfig:
    """Settings of a training."""
    alone = {"workers": 1, "zero_stage": 0}
    config: TrainConfig = recipe_config(RECIPE, "train", seed=seed, epochs=epochs, sets=tuple(sets), **alone)
    size = {"image_height": settings.height, "image_width": settings.height // 2}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **size),
        losses=dataclasses.replace(config.losses, soft_labels=soft_labels),
    )


def stored_images(sets: Sequence[InputSet]) -> InFiles:
    """The images of sets, in files of this machine."""
    tables = [(each.store.uri, each.tables["images"]) for each in sets]
    return InFiles(sets[0].store.uri, "benchmark", dict(enumerate(parts_of(tables))))


def new_model(config: TrainConfig) -> CECA:
    torch.manual_seed(config.seed)
    return build_model(config.model)


def fit(data: str, config: TrainConfig, start: CECA | None = None) -> CECA:
    """Train a model on a dataset and the further sets of the settings, as `ceca train` does; by default a new one."""
    model = new_model(config)
    if start is not None:
        model.load_state_dict(start.state_dict())
    sets = input_sets(Store(data), config)
    samples = training_set(sets, config)
    batches = Batches.of(samples.visited, config)
    load = LoadSamples(config, 0, 1, samples, stored_images(sets), 0)  # type: ignore[arg-type]
    engine = make_engine(model, config, len(batches))
    engine.train()
    for number in range(config.epochs * len(batches)):
        epoch, step = divmod(number, len(batches))
        places = batches.places(step, 0, 1)
        batch = load({"id": epoch * batches.samples + np.array(places)})
        train_step(engine, batch, config, epoch, step, CPU, len(places))
    engine.destroy()
    return model


def measure(data: str, config: TrainConfig, model: CECA) -> dict[str, float]:
    """Figures of a model on a dataset's test split, by the fused similarity."""
    sets = input_sets(Store(data), dataclasses.replace(config, sets=()))
    shown = held_out(sets[0].store, sets[0].tables, "released")  # the split test
    run = Run(config, data, "benchmark", None, stored_images(sets), shown)
    return validate(model.eval(), run, CPU)


def main(settings: Settings) -> None:
    first, second, unnamed = make_set(settings, 0), make_set(settings, 1), make_set(settings, 2, named=False)
    alone_in_this_process()
    kept = settings.folder / "figures.json"
    found: dict[str, dict[str, dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}

    def keep(kind: str, config: TrainConfig, made: Callable[[], CECA], *sets: str) -> None:
        """Measure a model on sets, unless the figures are there."""
        rows = [(data, found.setdefault(f"{kind}, on {'B' if data == second else 'A'}", {})) for data in sets]
        if all(str(config.seed) in row for _, row in rows):
            return
        model = made()
        for data, row in rows:
            row[str(config.seed)] = measure(data, config, model)
        kept.write_text(json.dumps(found, indent=1))

    make = functools.partial(training, settings)

    def pre_train(seed: int, labels: str, share: float) -> None:
        config, short = make(seed, settings.epochs, soft_labels=share), make(seed, 1)
        start = functools.cache(lambda: fit(unnamed, config))
        keep(f"pre-trained, {labels} labels", config, start, first)
        keep(f"pre-trained, {labels} labels, then one epoch", short, lambda: fit(first, short, start()), first)

    def compare(seed: int) -> None:
        config, short = make(seed, settings.epochs), make(seed, 1)
        both = make(seed, settings.epochs, sets=(second,))
        keep("alone", config, lambda: fit(first, config), first)
        keep("alone", config, lambda: fit(second, config), second)
        keep("together", both, lambda: fit(first, both), first, second)
        keep("random weights", config, lambda: new_model(config), first)
        keep("random weights, then one epoch", short, lambda: fit(first, short), first)
        pre_train(seed, "soft", settings.soft_labels)

    def explain(seed: int) -> None:
        """What the gains come from: as many steps as alone, and labels that are not soft."""
        halved = make(seed, settings.epochs // 2, sets=(second,))
        keep("together, half of the epochs", halved, lambda: fit(first, halved), first, second)
        pre_train(seed, "hard", 0.0)

    for part in (compare, explain):
        for seed in range(settings.seeds):
            part(seed)
    title = f"{settings.identities} people per set, {settings.epochs} epochs: mean ± deviation, percent"
    table = text_table(title, "training", "seeds", *SHOWN.values(), left="training")
    for kind, figures in found.items():
        rows = summarise(list(figures.values()))
        table.add_row(kind, str(len(figures)), *(f"{rows[key][0]:.2f} ± {rows[key][1]:.2f}" for key in SHOWN))
    console.print(table)


def alone_in_this_process() -> None:
    """Make this process the only worker. It holds everything, so a reference of Ray is the object itself."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    ray.get = lambda reference: reference  # type: ignore[assignment]


if __name__ == "__main__":
    entry(lambda: main(tyro.cli(Settings, description=__doc__)))
