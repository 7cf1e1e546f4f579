"""Small steps of a recipe on this machine's CPUs, two per set, to find mistakes before a long run."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence

import pyarrow as pa

from ceca.config import TrainConfig
from ceca.data.parts import decode
from ceca.data.store import Store
from jobs.runtime.console import console
from jobs.runtime.ray_session import connect
from jobs.training.run import fit, make_run
from jobs.training.samples import training_set
from jobs.training.sets import InputSet

FOLDER = "models/dry-run/run"
STEPS = 2


def shrink(config: TrainConfig) -> TrainConfig:
    """The recipe's model, losses and data with random weights, a small batch, and one CPU worker in fp32."""
    return dataclasses.replace(
        config,
        name="dry-run",
        model=dataclasses.replace(config.model, pretrained=None),
        global_batch=min(4, config.global_batch),
        epochs=1,
        precision="fp32",
        noise_file=None,
        set_weights=(),
        validate_every=0,
        workers=1,
        workers_min=None,
        gpus_per_worker=0,
        loaders_per_worker=1,
        offload=False,
        watch=(),
    )


def take_steps(sets: Sequence[InputSet], config: TrainConfig) -> list[float]:
    """Take the steps in a temporary folder; returns the losses.

    Args:
        sets: what to learn from.
        config: settings from `shrink`.
    """
    connect()
    with tempfile.TemporaryDirectory(prefix="ceca-dry-run-") as folder:
        scratch = Store(folder)
        run = make_run(sets, config, FOLDER, training_set(sets, config, steps=STEPS), None)
        checkpoint = fit(scratch, config, dataclasses.replace(run, store_uri=scratch.uri))
        curve = decode(pa.BufferReader(scratch.read_bytes(FOLDER, checkpoint, "curve.parquet")))
    losses = curve["loss"].to_pylist()
    shown = ", ".join(f"{loss:.3f}" for loss in losses)
    console.print(f"train: dry run of {config.model.backbone}, losses {shown}")
    return losses
