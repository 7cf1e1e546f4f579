"""Open: from a folder of pictures, or any other source, to a search page.

    ceca open /cameras/2026
    ceca open people.csv --columns image=file --engine vllm

The stages ingest, dialogue (with an engine) and index run one after the other, and then the service. The same command
again reads, describes and embeds only what is new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ceca.config import DialogueConfig, IndexConfig, IngestConfig, ModelConfig
from ceca.config.ingest import Source
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.model.registry import find_model, require_model
from jobs.dialogue import dialogue
from jobs.index import index
from jobs.ingest import ingest
from jobs.pipeline import recipe_config
from jobs.runtime.alone import alone
from jobs.runtime.console import console, entry, restore_stderr

Engine = Literal["none", "vllm", "openai", "oracle"]


def open_pictures(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="folder, file or URI of the pictures")],
    data: Annotated[str, tyro.conf.arg(help="dataset URI; default: a folder SOURCE-ceca beside the source")] = "",
    layout: Annotated[Source, tyro.conf.arg(help="form of the source, as of `ceca ingest`")] = "auto",
    columns: Annotated[
        tuple[str, ...], tyro.conf.arg(help="columns of a table, as of `ceca ingest`: image=file text=caption")
    ] = (),
    images: Annotated[str, tyro.conf.arg(help="folder of the images that a table names")] = "",
    pretrained: Annotated[
        str, tyro.conf.arg(help="name or URI of a published model, or CLIP weights: open_clip tag, file or URI")
    ] = "openai",
    backbone: Annotated[str, tyro.conf.arg(help="backbone of CLIP weights")] = "ViT-B-16-quickgelu",
    engine: Annotated[Engine, tyro.conf.arg(help="who describes the images; `none`: nobody")] = "none",
    recipe: Annotated[str, tyro.conf.arg(help="name or path of a recipe with settings of the engine")] = "",
    port: Annotated[int, tyro.conf.arg(help="port of the search page")] = 8000,
    serve: Annotated[bool, tyro.conf.arg(help="start the search page; without, the gallery alone is made")] = True,
) -> None:
    """From a folder of pictures to a search page; again, only what is new is read, described and embedded."""
    data = data or place_beside(source)
    store = Store(data)
    described = engine != "none"
    asked = recipe_config(recipe, "dialogue") if recipe else DialogueConfig()
    with alone(store, "open"):
        console.print(f"open: {source} → {store.uri}")
        name = find_or_publish(store, pretrained, backbone, summaries=described)
        model = require_model(store, name)
        if model.config["model"]["summary_weight"] and not described:
            raise UserError(f"{model.uri} uses summaries: give --engine, or weights of CLIP as --pretrained")
        config = IngestConfig(source=source, layout=layout, columns=columns, images=images, only_missing=True)
        ingest(data, config, mirror=True)
        if described:
            again = store.manifest("dialogues") is not None
            dialogue(data, dataclasses.replace(asked, engine=engine, only_missing=again))
        gallery = store.manifest("gallery")
        again = gallery is not None and gallery.made_from["model"] == model.digest
        index(data, IndexConfig(model=name, split=None, only_missing=again))
    if serve:
        _serve(data, port, name)
    console.print(f"open: `ceca serve --data {data} --model {name}` starts the search page")


def find_or_publish(store: Store, pretrained: str, backbone: str, *, summaries: bool) -> str:
    """A published model of this name or URI; else CLIP with these weights, published as a model of the dataset.

    Args:
        store: the dataset.
        pretrained: name or URI of a published model, or CLIP weights: open_clip tag, file or URI.
        backbone: the backbone of CLIP weights.
        summaries: whether images have summaries.

    Returns:
        The model's name or URI.
    """
    # A file of weights is no folder in which a model could be.
    if not Path(pretrained).is_file() and find_model(store, pretrained) is not None:
        return pretrained
    name = f"clip-{_mark(pretrained)}-{backbone}" + ("-summaries" if summaries else "")
    if find_model(store, name) is not None:
        return name
    from ceca.model.clip import describe
    from ceca.model.weights import build_model, publish_model, serialize

    size = describe(backbone)["vision_cfg"]["image_size"]
    config = ModelConfig(
        backbone=backbone,
        pretrained=pretrained,
        image_height=size,
        image_width=size,
        local_branch=False,
        mixer="none",
        summary_weight=0.3 if summaries else 0.0,
    )
    weights = serialize(build_model(config).state_dict())
    published = publish_model(
        store,
        name,
        weights,
        model=config,
        config={},
        training={"imported_from": pretrained},
        made_from={},
        version=hashlib.sha256(weights).hexdigest()[:12],
    )
    console.print(f"open: {backbone} with weights {pretrained} → {published.uri}")
    return name


def _mark(pretrained: str) -> str:
    """What names CLIP weights: their tag, or a digest of their file or URI; files of one name differ."""
    path = Path(pretrained)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:8]
    return pretrained if "/" not in pretrained else hashlib.sha256(pretrained.encode()).hexdigest()[:8]


def place_beside(source: str) -> str:
    """Where the dataset of a source is put: a folder beside it.

    >>> place_beside("/cameras/2026/"), place_beside("lists/people.csv")
    ('/cameras/2026-ceca', 'lists/people-ceca')

    Raises:
        UserError: the source is a URI.
    """
    if "://" in source:
        raise UserError(f"give --data with a folder or URI for the dataset of {source}")
    path = Path(source) if Path(source).name not in ("", "..") else Path(source).resolve()
    return str(path.with_name(f"{path.stem if path.suffix and not path.is_dir() else path.name}-ceca"))


def main(argv: list[str] | None = None) -> None:
    tyro.cli(open_pictures, args=argv, prog="ceca open")


def _serve(data: str, port: int, model: str) -> None:
    """Become the search service: jobs do not import it. The stages' Ray ends first."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
    restore_stderr()
    os.execv(sys.executable, [sys.executable, "-m", "serve", "--data", data, "--model", model, "--port", str(port)])


if __name__ == "__main__":
    entry(main)
