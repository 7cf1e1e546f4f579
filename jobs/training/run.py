"""A training run from its samples to the published model: Ray Train starts the workers."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from ceca.config import TrainConfig
from ceca.data.filesystems import as_pyarrow
from ceca.data.names import MODELS
from ceca.data.replacing import Check, unchecked
from ceca.data.store import Store
from ceca.environment import usable_gpus
from ceca.errors import UserError
from ceca.model.registry import PublishedModel
from ceca.model.weights import publish_model
from ceca.settings import to_mapping
from jobs.runtime.console import console
from jobs.runtime.ray_session import START_TIMEOUT, WORKERS, connect
from jobs.training.data import HeldOut, Run, TrainingSet, training_machines
from jobs.training.images import hold_images
from jobs.training.samples import held_out, training_set
from jobs.training.sets import InputSet
from jobs.training.worker import train_worker

WHOLE = "whole.json"  # in a run's folder, once its training has ended


def train_and_publish(
    store: Store,
    config: TrainConfig,
    sets: Sequence[InputSet],
    made_from: dict[str, str],
    version: str,
    *,
    redo: bool,
    check: Check = unchecked,
) -> PublishedModel:
    """Train a model, or continue its run, and publish the weights of the best epoch.

    Args:
        store: the dataset.
        config: settings of the training.
        sets: what to learn from; the epoch is chosen on the first one, the dataset itself.
        made_from: the versions of their tables.
        version: version of the model.
        redo: train again even if a run of this version has ended.
        check: raises an error if this process may not publish any more.
    """
    folder = f"{MODELS}/{config.name}/run-{version}"
    if redo and store.read_json(folder, WHOLE) is not None:  # left by a run that was killed after publishing
        store.remove(folder)
    connect(store)
    started = time.monotonic()
    samples = training_set(sets, config)
    validation = held_out(store, sets[0].tables, config.protocol) if config.validate_every else None
    run = make_run(sets, config, folder, samples, validation)
    texts_cut = {"captions": samples.caption.cut, "summaries": samples.summary.cut}
    checkpoint = fit(store, config, run)
    record, weights, curve = _best(store, folder, checkpoint)
    validation_split = validation.split if validation is not None else None
    record |= {
        "protocol": config.protocol,
        "validation_split": validation_split,
        "texts_cut": texts_cut,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "ray": ray.__version__},
        "parameters": sum(value.numel() for value in safetensors.torch.load(weights).values()),
    }
    store.write_json({"version": version}, folder, WHOLE)
    published = publish_model(
        store,
        config.name,
        weights,
        model=config.model,
        config=to_mapping(config),
        training=record,
        made_from=made_from,
        version=version,
        extras={"curve.parquet": curve},
        check=check,
    )
    check()  # else it may be the folder of another process, which trains again
    store.remove(folder)
    best = record["best"]
    chosen = (
        f", best on {validation_split} with Rank-1 {best['rank1']:.1f} (protocol {config.protocol})"
        if "rank1" in best
        else ""
    )
    console.print(f"train: {config.name} of epoch {best['epoch']}{chosen}; {record['seconds']:.0f} s → {published.uri}")
    return published


def make_run(
    sets: Sequence[InputSet], config: TrainConfig, folder: str, samples: TrainingSet, validation: HeldOut | None
) -> Run:
    """Put the samples into Ray's object store for the workers.

    Args:
        sets: what to learn from, the dataset first.
        config: settings of the training.
        folder: the run's folder below the dataset.
        samples: of the sets.
        validation: held-out images of the dataset, or None.
    """
    store = sets[0].store
    tables = [(each.store.uri, each.tables["images"]) for each in sets]
    parts = set(np.unique(samples.part).tolist())
    if validation is not None:
        parts |= {row.part for row in validation.images}
    return Run(
        config=dataclasses.replace(config, gpus_per_worker=usable_gpus(config.gpus_per_worker)),
        store_uri=store.uri,
        run=folder,
        images=hold_images(store, tables, parts, folder, training_machines(config)),
        samples=ray.put(samples),
        validation=ray.put(validation) if validation is not None else None,
    )


class Trainer(ray.train.torch.TorchTrainer):
    """Leaves Ctrl-C to the command: Ray's handler exits with code 0, and stays installed after training."""

    def _register_sigint_handler(self, controller: Any) -> None: ...


def fit(store: Store, config: TrainConfig, run: Run) -> str:
    """Run the trainer to its end.

    Args:
        store: where checkpoints are written, in the run's folder.
        config: settings of the training: GPUs as declared, while `run.config` has the usable ones.
        run: the workers' input.

    Returns:
        Name of the last checkpoint's folder.

    Raises:
        UserError: a worker raised it.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if config.workers_min and os.environ.get(START_TIMEOUT) == WORKERS[START_TIMEOUT]:
        # An elastic run keeps Ray Train's own minute: it may have counted a node that is gone, and must count again.
        os.environ[START_TIMEOUT] = "60"
    storage = None
    if not isinstance(store.fs, LocalFileSystem):
        storage = as_pyarrow(store.fs)
    parent, _, name = run.run.rpartition("/")
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
            placement_strategy="PACK",  # as few machines as possible, for features are gathered in every step
            label_selector=training_machines(config),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=store.path(parent),
            storage_filesystem=storage,
            failure_config=ray.train.FailureConfig(max_failures=config.failures_allowed),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.checkpoints_kept),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        message = _user_error(error)
        if message is None:
            raise
        raise UserError(message) from error
    assert result.checkpoint is not None, "training ended without a checkpoint"
    return result.checkpoint.path.rstrip("/").rsplit("/", 1)[-1]


def _user_error(error: BaseException) -> str | None:
    """The message of a UserError that a worker raised, or None."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, UserError):
            return str(cause)
    return None


def _best(store: Store, folder: str, checkpoint: str) -> tuple[dict[str, Any], bytes, bytes]:
    """The training record of the last checkpoint, the weights of its best epoch, and the curve."""
    progress = store.read_json(folder, checkpoint, "progress.json")
    assert progress is not None, "a checkpoint without progress.json"
    record = {"history": progress["history"], "best": progress["best"]}
    weights = store.read_bytes(folder, f"best-{progress['best']['epoch']:04d}.safetensors")
    return record, weights, store.read_bytes(folder, checkpoint, "curve.parquet")
