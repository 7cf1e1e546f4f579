"""Weights: import checkpoints of other programs, and export a model's CLIP part to open_clip.

ceca weights import --data s3://bucket/cuhk --checkpoint rde/best.pth --name rde-published
ceca weights export --data s3://bucket/cuhk --model ceca-vitb16 --out clip.safetensors
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import tyro

from ceca.config import LossConfig, ModelConfig, TrainConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.model.registry import PublishedModel, find_model
from ceca.settings import check_name, to_mapping
from jobs.runtime.console import console, entry

Data = Annotated[str, tyro.conf.arg(help="dataset URI: a folder, file://… or s3://bucket/prefix")]


def import_weights(
    data: Data,
    checkpoint: Annotated[str, tyro.conf.arg(help="file or URI of IRRA's or RDE's checkpoint")],
    name: Annotated[str, tyro.conf.arg(help="the model's name below the dataset")],
    backbone: Annotated[str, tyro.conf.arg(help="the backbone it was trained with")] = "ViT-B-16-quickgelu",
    image_height: Annotated[int, tyro.conf.arg(help="in pixels")] = 384,
    image_width: Annotated[int, tyro.conf.arg(help="in pixels")] = 128,
) -> PublishedModel:
    """Publish a checkpoint of IRRA or RDE as a model, to evaluate, index and serve it."""
    check_name(name)
    from ceca.model.foreign import import_checkpoint
    from ceca.model.weights import publish_model, serialize

    store = Store(data)
    given = ModelConfig(backbone=backbone, image_height=image_height, image_width=image_width)
    config, state = import_checkpoint(checkpoint, given)
    weights = serialize(state)
    version = hashlib.sha256(weights).hexdigest()[:12]
    published = find_model(store, name)
    if published is not None and published.version != version:
        raise UserError(f"{published.uri} is published with other weights; use another --name")
    terms: Any = ("tal_global", "tal_local") if config.local_branch else ("sdm", "identity", "words")
    model = publish_model(
        store,
        name,
        weights,
        model=config,
        config=to_mapping(TrainConfig(name=name, model=config, losses=LossConfig(terms=terms))),
        training={"imported_from": checkpoint},
        made_from={},
        version=version,
    )
    kind = "RDE, global and local" if config.local_branch else "IRRA, global"
    console.print(f"weights: {len(state)} tensors ({kind}) → {model.uri}")
    return model


def export_weights(
    data: Data,
    out: Annotated[Path, tyro.conf.arg(help="the file to write, .safetensors")],
    model: Annotated[str, tyro.conf.arg(help="name below the dataset URI, or a URI of its own")] = "ceca",
) -> None:
    """Write a model's CLIP part for open_clip."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, found {out}")
    from ceca.model.foreign import export_clip
    from ceca.model.weights import load_model

    loaded, _ = load_model(Store(data), model)
    export_clip(loaded, out)
    config = loaded.config
    console.print(
        f"weights: → {out}; open_clip.create_model({config.backbone!r}, pretrained={str(out)!r}, "
        f"force_image_size=({config.image_height}, {config.image_width}))",
        highlight=False,
    )


def main(argv: list[str] | None = None) -> None:
    kinds: dict[str, Any] = {"import": import_weights, "export": export_weights}
    tyro.extras.subcommand_cli_from_dict(kinds, args=argv, prog="ceca weights", description="Weights in and out.")


if __name__ == "__main__":
    entry(main)
