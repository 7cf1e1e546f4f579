"""Train: images, captions and dialogues become a model.

    python jobs/train.py --recipe cuhk_pedes --data s3://bucket/cuhk --name ceca-vitb16

Ray Train starts the workers, DeepSpeed steps. The same command continues a run that was killed; the model is
published when the last epoch is done, as the weights of the epoch that was best on the validation split.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from ceca.commandline import parse_arguments
from ceca.config import TrainConfig
from ceca.data.names import MODELS
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import Manifest, Reject, Store, StoreError, version_of
from ceca.data.tables import ImageRow, add_summaries, list_images, make_pairs
from ceca.environment import usable_gpus
from ceca.errors import UserError
from ceca.model.backbone import tokenize
from ceca.model.registry import PublishedModel, find_model
from ceca.model.tokens import count_tokens
from ceca.model.weights import publish_model
from ceca.settings import to_mapping
from ceca.training.order import shuffled_captions
from jobs.runtime.alone import alone
from jobs.runtime.console import console, entry
from jobs.runtime.ray_session import connect
from jobs.training.data import Run, TrainingSet, load_images
from jobs.training.worker import train_worker

WHOLE = "whole.json"  # in a run's folder, once its training has ended


def train(data: str, config: TrainConfig, *, redo: bool = False) -> PublishedModel:
    """Train a model and publish it under models/<name>."""
    if config.precision == "fp16" and not usable_gpus(config.gpus_per_worker):
        raise UserError("precision fp16 needs GPUs, and this cluster only declares some; use bf16 or fp32")
    store = Store(data)
    tables = _tables(store, config)
    made_from = {name: manifest.version for name, manifest in tables.items()}
    version = version_of("train", SCHEMA_VERSION, made_from, to_mapping(config, results_only=True))
    if not redo and (there := _published(store, config, version)):
        return there
    with alone(store, f"train-{config.name}"):
        if not redo and (there := _published(store, config, version)):  # by another process, a moment ago
            return there
        return _train(store, config, tables, made_from, version, redo=redo)


def _published(store: Store, config: TrainConfig, version: str) -> PublishedModel | None:
    """The model, where it is there as it would be made.

    Raises:
        UserError: there is another one of this name.
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


def _train(
    store: Store,
    config: TrainConfig,
    tables: Mapping[str, Manifest],
    made_from: dict[str, str],
    version: str,
    *,
    redo: bool,
) -> PublishedModel:
    run = f"{MODELS}/{config.name}/run-{version}"
    if redo and store.read_json(run, WHOLE) is not None:  # of a run that was killed between publishing and cleaning
        store.remove(run)
    connect()
    started = time.monotonic()
    prepared, used_validation = _prepare(store, config, tables, run)
    checkpoint = _fit(store, config, prepared, f"run-{version}")
    record, weights, curve = _best(store, run, checkpoint)
    record |= {
        "validation_split": used_validation,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "ray": ray.__version__},
        "parameters": sum(value.numel() for value in safetensors.torch.load(weights).values()),
    }
    store.write_json({"version": version}, run, WHOLE)
    made = publish_model(
        store,
        config.name,
        weights,
        model=config.model,
        config=to_mapping(config),
        training=record,
        made_from=made_from,
        version=version,
        extras={"curve.parquet": curve},
    )
    store.remove(run)
    best = record["best"]
    chosen = f", best on {used_validation} with Rank-1 {best['rank1']:.1f}" if "rank1" in best else ""
    console.print(f"train: {config.name} of epoch {best['epoch']}{chosen}; {record['seconds']:.0f} s → {made.uri}")
    return made


def dry_run(data: str, config: TrainConfig) -> list[float]:
    """Take two steps of a recipe on this machine's CPUs and keep nothing: the losses.

    The model, the losses and the data are the recipe's; the weights are random, the batch is small, and precision and
    workers are what any machine has.
    """
    small = dataclasses.replace(
        config,
        name="dry-run",
        model=dataclasses.replace(config.model, pretrained=None),
        global_batch=min(4, config.global_batch),
        epochs=1,
        precision="fp32",
        validate_every=0,
        workers=1,
        workers_min=None,
        gpus_per_worker=0,
        loaders_per_worker=1,
        offload=False,
        watch=(),
    )
    store = Store(data)
    tables = _tables(store, small)
    connect()
    with tempfile.TemporaryDirectory(prefix="ceca-dry-run-") as place:
        scratch = Store(place)
        prepared, _ = _prepare(store, small, tables, "models/dry-run/run", steps=2)
        checkpoint = _fit(scratch, small, dataclasses.replace(prepared, store_uri=scratch.uri), "run")
        table = pq.read_table(pa.BufferReader(scratch.read_bytes("models/dry-run/run", checkpoint, "curve.parquet")))
    losses = table["loss"].to_pylist()
    console.print(f"train: dry run of {config.model.backbone}, losses {', '.join(f'{x:.3f}' for x in losses)}")
    return losses


def _tables(store: Store, config: TrainConfig) -> dict[str, Manifest]:
    """The tables to learn from, by name; dialogues only where summaries are used."""
    tables = {name: store.current(name, "ingest") for name in ("images", "captions")}
    check_made_from_same_ingest(tables["images"], tables["captions"])
    if config.model.summary_weight > 0:
        tables["dialogues"] = store.current("dialogues", "dialogue")
    return tables


def check_made_from_same_ingest(images: Manifest, captions: Manifest) -> None:
    if images.version != captions.version:
        raise StoreError(
            f"images {images.version} and captions {captions.version} are from different runs of ingest; run it again"
        )


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    found = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := _difference(before, value, f"{prefix}{key}."):
                found.append(inner)
        elif before != value:
            found.append(f"{prefix}{key}: {before} there, {value} here")
    return "; ".join(found) or ("" if prefix else "same settings, other input tables")


def _prepare(
    store: Store, config: TrainConfig, tables: Mapping[str, Manifest], run: str, steps: int | None = None
) -> tuple[Run, str | None]:
    """Lay the samples out in Ray's object store; also the split that validates, or None.

    With `steps`, only so many global batches of pairs, from all over the split.
    """
    images, captions, dialogues = tables["images"], tables["captions"], tables.get("dialogues")

    def told(split: str) -> tuple[list[ImageRow], list[Reject]]:
        rows = list_images(store, images, split)
        return add_summaries(store, rows, images, dialogues) if dialogues is not None else (rows, [])

    rows, missing = told(config.split)
    if missing:
        console.print(f"[yellow]warning:[/] {len(missing)} images have no summary and are left out of training")
    pairs = make_pairs(store, rows, captions)
    if pairs.num_rows < config.global_batch:
        raise UserError(
            f"split {config.split!r} has {pairs.num_rows} image-caption pairs, fewer than one global batch of "
            f"{config.global_batch}; lower --global-batch or check the dataset"
        )
    if steps is not None:
        pairs = pairs.take(np.linspace(0, pairs.num_rows - 1, steps * config.global_batch).astype(int))
    cut = sum(count_tokens(row.summary) > 77 for row in rows)
    console.print(
        f"train: {len(rows):,} images, {pairs.num_rows:,} pairs, {len({row.identity for row in rows}):,} identities; "
        f"{cut / max(1, len(rows)):.1%} of summaries are longer than CLIP's 77 tokens"
    )
    validation, used = None, None
    parts = {row.part for row in rows}
    if config.validate_every:
        used = "val"
        held_out, _ = told(used)
        if not held_out:
            used = "test"
            held_out, _ = told(used)
            console.print(
                "[yellow]warning:[/] there is no split val; the model is chosen on test, as its benchmark does"
            )
        queries = make_pairs(store, held_out, captions)
        parts |= {row.part for row in held_out}
        validation = (
            ray.put(
                {
                    "images": [(row.part, row.row, row.identity, row.summary) for row in held_out],
                    "queries": list(zip(queries["caption"].to_pylist(), queries["identity"].to_pylist(), strict=True)),
                }
            )
            if held_out and queries.num_rows
            else None
        )
        used = used if validation is not None else None
    references = load_images(store, images, parts)
    captions_of = shuffled_captions(pairs.num_rows, config.seed, config.caption_noise)
    samples = TrainingSet(
        part=pairs["part"].to_numpy(),
        row=pairs["row"].to_numpy(),
        identity=np.unique(pairs["identity"].to_numpy(), return_inverse=True)[1],
        caption=tokenize(pairs["caption"].to_pylist()).numpy().astype(np.uint16)[captions_of],
        summary=tokenize(pairs["summary"].to_pylist()).numpy().astype(np.uint16),
    )
    computing = dataclasses.replace(config, gpus_per_worker=usable_gpus(config.gpus_per_worker))
    return Run(computing, store.uri, run, ray.put(samples), references, validation), used


class Trainer(ray.train.torch.TorchTrainer):
    """Leaves Ctrl-C to us: Ray's handler ends with code 0, and stays when training has ended."""

    def _register_sigint_handler(self, controller: Any) -> None: ...


def _fit(store: Store, config: TrainConfig, run: Run, name: str) -> str:
    """Run the trainer to its end; the name of the last checkpoint's folder."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if not config.workers_min:
        # Machines that an autoscaler brings take minutes to come, and Ray Train gives up after one and begins anew. An
        # elastic run keeps to that minute: it may have counted a node that is gone, and has to count again.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")
    storage = None
    if not isinstance(store.fs, LocalFileSystem):
        storage = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store.fs))
    trainer = Trainer(
        train_worker,
        train_loop_config={"run": run},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if run.config.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.workers_min, config.workers) if config.workers_min else config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": config.cpus_per_worker,
                **({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=store.path(MODELS, config.name),
            storage_filesystem=storage,
            failure_config=ray.train.FailureConfig(max_failures=config.failures_allowed),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.checkpoints_kept),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = _user_error(error)
        if cause is None:
            raise
        raise UserError(cause) from error
    assert result.checkpoint is not None, "training ended without a checkpoint"
    return result.checkpoint.path.rstrip("/").rsplit("/", 1)[-1]


def _user_error(error: BaseException) -> str | None:
    """The message of a UserError that a worker raised, however deep Ray has wrapped it."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, UserError):
            return str(cause)
    return None


def _best(store: Store, run: str, checkpoint: str) -> tuple[dict[str, Any], bytes, bytes]:
    """The training record of the last checkpoint, the weights it names as best, and the curve."""
    progress = store.read_json(run, checkpoint, "progress.json")
    assert progress is not None, "a checkpoint without progress.json"
    record = {"history": progress["history"], "best": progress["best"]}
    weights = store.read_bytes(run, f"best-{progress['best']['epoch']:04d}.safetensors")
    return record, weights, store.read_bytes(run, checkpoint, "curve.parquet")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("train", argv, prog="train")
    if arguments.dry_run:
        dry_run(arguments.data, arguments.config)
        return
    train(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
