"""Train: images, captions and dialogues become a model.

    python jobs/train.py --recipe cuhk_pedes --data s3://bucket/cuhk --name ceca-vitb16

Ray Train starts the workers. The same command continues a run that was killed. The model is published
after the last epoch, with the weights of the epoch that was best on the validation split.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ceca.commandline import parse_arguments
from ceca.config import TrainConfig
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import Store, version_of
from ceca.environment import usable_gpus
from ceca.errors import UserError
from ceca.model.registry import PublishedModel, find_model, find_named
from ceca.settings import to_mapping
from jobs.runtime.alone import alone
from jobs.runtime.console import console, entry
from jobs.training.sets import input_sets, versions_of


def train(data: str, config: TrainConfig, *, redo: bool = False) -> PublishedModel:
    """Train a model and publish it under models/<name>.

    Args:
        data: dataset URI.
        config: settings of the training.
        redo: train again even if this model is published.

    Raises:
        UserError: another model of this name is published, or the settings do not fit the cluster or the data.
    """
    if config.precision == "fp16" and not usable_gpus(config.gpus_per_worker):
        raise UserError("precision fp16 needs GPUs, and this cluster only declares some; use bf16 or fp32")
    store = Store(data)
    sets = input_sets(store, config)
    made_from = versions_of(sets)
    if config.noise_file is not None:  # by content: a copy elsewhere gives the same model
        from jobs.training.samples import read_noise_file

        made_from["noise_file"] = hashlib.sha256(read_noise_file(config.noise_file)).hexdigest()
    if config.model.pretrained is not None and (start := find_named(store, config.model.pretrained)) is not None:
        made_from["pretrained"] = start.digest  # another model may be published under its name later
    version = version_of("train", SCHEMA_VERSION, made_from, to_mapping(config, results_only=True))
    if not redo and (published := _published(store, config, version)):
        return published
    with alone(store, f"train-{config.name}") as lease:
        if not redo and (published := _published(store, config, version)):  # by another process, a moment ago
            return published
        from jobs.training.run import train_and_publish

        return train_and_publish(store, config, sets, made_from, version, redo=redo, check=lease.check)


def dry_run(data: str, config: TrainConfig) -> list[float]:
    """Take two steps of a recipe, with each of its sets, on this machine's CPUs and keep nothing; returns the losses.

    Model, losses and data are the recipe's. The weights are random, the batch is small, and precision and workers fit
    any machine.
    """
    from jobs.training.dry_run import shrink, take_steps

    small = shrink(config)
    return take_steps(input_sets(Store(data), small), small)


def _published(store: Store, config: TrainConfig, version: str) -> PublishedModel | None:
    """The published model, if it has this version; None if no model has this name.

    Raises:
        UserError: a model of another version has this name.
    """
    published = find_model(store, config.name)
    if published is None:
        return None
    if published.version != version:
        difference = _difference(published.config["train"], to_mapping(config, results_only=True))
        raise UserError(
            f"{published.uri} is published with other settings or data ({difference}); "
            "use another --name, or pass --redo to replace it"
        )
    console.print(f"train: {published.uri} is published already (--redo trains it again)")
    return published


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The settings that differ, for a message."""
    differing = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := _difference(before, value, f"{prefix}{key}."):
                differing.append(inner)
        elif before != value:
            differing.append(f"{prefix}{key}: {before} there, {value} here")
    return "; ".join(differing) or ("" if prefix else "same settings, other input tables")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("train", argv, prog="train")
    if arguments.dry_run:
        dry_run(arguments.data, arguments.config)
        return
    train(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
