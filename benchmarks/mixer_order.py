"""The mixer as described and as released, with the ε of the published recipes and with Adam's default.

    python benchmarks/mixer_order.py                 # 150 drawn people, 4 epochs, 3 seeds: 12 trainings
    python benchmarks/mixer_order.py --epochs 10 --identities 360     # the size of the demo

Draws pedestrians, takes them through ingest and dialogue, and compares the four on the test split (`ceca compare`).
The same command continues a run that was stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
import yaml

from jobs.compare import compare
from jobs.dialogue import dialogue
from jobs.draw import draw
from jobs.ingest import ingest
from jobs.pipeline import recipe_config
from jobs.runtime.console import entry

ORDERS, EPSILONS = ("alternating", "released"), ("1e-3", "1e-8")


@dataclasses.dataclass
class Settings:
    """What is compared."""

    identities: int = 150
    """Number of drawn people; four images each."""
    epochs: int = 4
    """Epochs of each training."""
    seeds: int = 3
    """Trainings of each kind, with seeds from 0."""
    folder: Path = Path("/tmp/ceca-mixer-order")
    """Where everything is put."""


def main(settings: Settings) -> None:
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    small = folder / "small.yaml"
    training = {"epochs": settings.epochs, "validate_every": settings.epochs}
    small.write_text(yaml.safe_dump({"draw": {"identities": settings.identities}, "train": training}))
    methods = []
    for order in ORDERS:
        for epsilon in EPSILONS:
            methods.append(str(folder / f"{order}-{epsilon}.yaml"))
            own = {"model": {"mixer_order": order}, "optimiser": {"epsilon": float(epsilon)}}
            Path(methods[-1]).write_text(yaml.safe_dump({"train": own}))
    recipe, data = f"tiny+{small}", str(folder / "data")
    if not (folder / "drawn" / "reid_raw.json").exists():
        draw(str(folder / "drawn"), recipe_config(recipe, "draw"))
    ingest(data, recipe_config(recipe, "ingest", source=str(folder / "drawn")))
    dialogue(data, recipe_config(recipe, "dialogue"))
    compare(data, recipe, tuple(methods), settings.seeds)


if __name__ == "__main__":
    entry(lambda: main(tyro.cli(Settings, description=__doc__)))
