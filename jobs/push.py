"""Push: a published model to the Hugging Face hub, with a model card and a part that open_clip loads.

ceca push ceca-vitb16 owner/name --data s3://bucket/cuhk
ceca push ceca-vitb16 --data s3://bucket/cuhk --folder out     # look at it first
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from ceca.data.names import EVALUATIONS, MANIFEST
from ceca.data.store import Store, StoreError
from ceca.errors import UserError
from ceca.model.registry import PublishedModel, locate, require_model
from jobs.runtime.console import console, entry

NAME = re.compile(r"[\w.-]+/[\w.-]+")


def push(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="name below the dataset URI, or a URI of its own")],
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="owner/name on the hub")] = "",
    data: Annotated[str, tyro.conf.arg(help="dataset URI, in which a name is looked up")] = ".",
    folder: Annotated[Path | None, tyro.conf.arg(help="write here what would be uploaded, and upload nothing")] = None,
    private: Annotated[bool, tyro.conf.arg(help="a new repository is private")] = False,
) -> None:
    """Upload a published model to the Hugging Face hub."""
    if folder is None and not NAME.fullmatch(name):
        raise UserError(f"name the model's place on the hub as owner/name, or give --folder; found {name!r}")
    store = Store(data)
    published = require_model(store, model)
    title = name or published.uri.rstrip("/").rsplit("/", 1)[-1]
    if folder is not None:
        write_folder(store, model, published, title, folder)
        console.print(f"push: {published.uri} → {folder} (nothing was uploaded)")
        return
    from ceca.model.hub import HUB, upload

    with tempfile.TemporaryDirectory() as made:
        write_folder(store, model, published, title, Path(made))
        url = upload(Path(made), name, private=private)
    console.print(f"push: {published.uri} → {url}; use it as {HUB}{name}", highlight=False)


def write_folder(store: Store, model: str, published: PublishedModel, title: str, folder: Path) -> None:
    """Write a model's folder, its CLIP part for open_clip, and its card.

    Args:
        store: the dataset.
        model: the model, by name or URI.
        published: its description.
        title: its name in the card.
        folder: an empty or new folder.

    Raises:
        UserError: the folder holds something else.
    """
    from ceca.model.card import model_card
    from ceca.model.foreign import open_clip_config, write_checkpoint
    from ceca.model.weights import load_weights

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder")
    home, names = locate(store, model)
    target = Store(str(folder.resolve()))
    for file in home.names(*names, published.digest):
        target.write_bytes(home.read_bytes(*names, published.digest, file), published.digest, file)
    target.write_json(home.read_json(*names, MANIFEST), MANIFEST)
    loaded = load_weights(target, target.uri, published.digest)
    write_checkpoint(loaded, folder / "open_clip_model.safetensors", "open_clip")
    config = loaded.config
    described = open_clip_config(config.backbone, (config.image_height, config.image_width), config.context)
    target.write_json(described, "open_clip_config.json")
    curve = _draw_curve(target, published, title, folder / "training.png")
    card = model_card(title, published, _evaluations(store, published.digest), curve)
    target.write_bytes(card.encode(), "README.md")


def _evaluations(store: Store, digest: str) -> list[dict[str, Any]]:
    """The evaluations of a model in this dataset."""
    files = [file for file in store.names(EVALUATIONS, digest) if file.endswith(".json")]
    found = [store.read_json(EVALUATIONS, digest, file) for file in files]
    return [result for result in found if result and "metrics" in result]


def _draw_curve(target: Store, published: PublishedModel, title: str, picture: Path) -> str:
    """Draw the training of a model; return the picture's name, empty if the training was not recorded."""
    from ceca.report.figures import draw_training
    from jobs.reports.figures import training_curve

    try:
        content = target.read_bytes(published.digest, "curve.parquet")
    except (FileNotFoundError, StoreError):
        return ""
    curve, validation = training_curve(published, content)
    draw_training({title: curve}, {title: validation}, picture)
    return picture.name


def main(argv: list[str] | None = None) -> None:
    tyro.cli(push, args=argv, prog="ceca push")


if __name__ == "__main__":
    entry(main)
