"""Weights: import checkpoints of other programs, and export models in their formats.

ceca weights import --data s3://bucket/cuhk --checkpoint rde/best.pth --name rde-published
ceca weights export --data s3://bucket/cuhk --model ceca-vitb16 --out clip.safetensors
ceca weights export --data s3://bucket/cuhk --model rde-published --out best.pth --format rde
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ceca.config import Format, LossConfig, ModelConfig, Protocol, TrainConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.model.registry import PublishedModel, find_model, require_model
from ceca.settings import check_name, to_mapping
from jobs.runtime.console import console, entry

if TYPE_CHECKING:
    from ceca.model.foreign import Checkpoint

Data = Annotated[str, tyro.conf.arg(help="dataset URI: a folder, file://… or s3://bucket/prefix")]


def import_weights(
    data: Data,
    checkpoint: Annotated[
        str,
        tyro.conf.arg(help="file or URI (CLIP, IRRA, RDE, CECA), open_clip tag, or a published model by name or URI"),
    ],
    name: Annotated[str, tyro.conf.arg(help="the model's name below the dataset")],
    backbone: Annotated[str, tyro.conf.arg(help="the backbone it was trained with")] = "ViT-B-16-quickgelu",
    image_height: Annotated[int, tyro.conf.arg(help="in pixels")] = 384,
    image_width: Annotated[int, tyro.conf.arg(help="in pixels")] = 128,
    context: Annotated[int, tyro.conf.arg(help="tokens of a text; above 77, CLIP's positions are interpolated")] = 77,
) -> PublishedModel:
    """Publish a checkpoint of another program as a model, to evaluate, index and serve it.

    Checkpoints of IRRA, RDE and CECA were chosen on test by their programs, so the model's protocol is `released`.
    """
    check_name(name)
    from ceca.model.foreign import import_checkpoint, read_checkpoint
    from ceca.model.weights import publish_model, serialize

    store = Store(data)
    given = ModelConfig(backbone=backbone, image_height=image_height, image_width=image_width, context=context)
    found = read_checkpoint(checkpoint, given, store)
    config, state = import_checkpoint(found, given)
    weights = serialize(state)
    version = hashlib.sha256(weights).hexdigest()[:12]
    published = find_model(store, name)
    if published is not None and published.version != version:
        raise UserError(f"{published.uri} is published with other weights; use another --name")
    train = _training_of(found, store, name, config)
    model = publish_model(
        store,
        name,
        weights,
        model=config,
        config=train,
        training={"imported_from": checkpoint, "not_used": found.not_used},
        made_from={},
        version=version,
    )
    kind = f"{found.kind}, {'global and local' if config.local_branch else 'global'}"
    console.print(f"weights: {len(state)} tensors ({kind}; protocol {model.protocol}) → {model.uri}")
    if found.not_used:
        console.print(f"weights: not used of the file: {', '.join(sorted(found.not_used))}")
    return model


def _training_of(found: Checkpoint, store: Store, name: str, config: ModelConfig) -> dict[str, Any]:
    """The settings of the training that made a checkpoint, as far as its kind says them."""
    if found.kind == "published model":
        settings: dict[str, Any] = require_model(store, found.source).config["train"]
        return settings
    terms: dict[str, Any] = {
        "CLIP": ("infonce",),
        "IRRA": ("sdm", "identity", "words"),
        "RDE": ("tal_global", "tal_local"),
        "CECA": ("tal_global", "tal_local", "cawl"),
    }
    protocol: Protocol = "validation" if found.kind == "CLIP" else "released"
    losses = LossConfig(terms=terms[found.kind])
    return to_mapping(TrainConfig(name=name, model=config, losses=losses, protocol=protocol))


def export_weights(
    data: Data,
    out: Annotated[Path, tyro.conf.arg(help="the file to write: .safetensors for open_clip, else .pt or .pth")],
    model: Annotated[str, tyro.conf.arg(help="name below the dataset URI, or a URI of its own")] = "ceca",
    format: Annotated[
        Format,
        tyro.conf.arg(help="open_clip, openai, irra: the towers; rde, ceca: the local branch too"),
    ] = "open_clip",
) -> None:
    """Write a model in the format of another program."""
    from ceca.model.foreign import write_checkpoint
    from ceca.model.weights import load_model

    loaded, _ = load_model(Store(data), model)
    left = write_checkpoint(loaded, out, format)
    config = loaded.config
    longer = config.context > ModelConfig().context
    hint = ""
    if format == "open_clip":
        hint = f"; open_clip.create_model({config.backbone!r}, pretrained={str(out)!r}, "
        hint += f"force_image_size=({config.image_height}, {config.image_width})"
        hint += f", force_context_length={config.context})" if longer else ")"
    console.print(f"weights: → {out} ({format}){hint}", highlight=False)
    if longer:
        console.print(f"weights: holds positions of {config.context} tokens; set its reader and tokenizer to as many")
    if left:
        console.print(f"weights: this format has no place for {', '.join(left)}")


def main(argv: list[str] | None = None) -> None:
    kinds: dict[str, Any] = {"import": import_weights, "export": export_weights}
    tyro.extras.subcommand_cli_from_dict(kinds, args=argv, prog="ceca weights", description="Weights in and out.")


if __name__ == "__main__":
    entry(main)
