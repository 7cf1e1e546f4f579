"""Progress of a training run: lines for a person, curves for TensorBoard, W&B or MLflow, gauges for Ray's metrics.

Only rank 0 reports progress. TensorBoard's curves are written beside the model, below models/<name>/curves/<run>; a
run that resumes continues its curves.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem

from ceca.config import TrainConfig
from ceca.data.names import MODELS
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.settings import to_mapping
from ceca.training.flops import step_flops
from ceca.training.workers import world
from jobs.runtime.noise import tell
from jobs.training.data import TrainingSet

# Dense bf16 and fp16 peak of a GPU in TFLOP/s, from its maker's data sheet, by a part of the GPU's name.
PEAK_TFLOPS = {
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "V100": 125, "T4": 65, "RTX 4090": 165,
}  # fmt: skip


def model_flops_utilisation(config: TrainConfig, samples: TrainingSet, samples_per_second: float) -> dict[str, float]:
    """`mfu`: operations of the model over the peak of the workers' GPUs; empty on CPU, in fp32, or on other GPUs."""
    if not config.gpus_per_worker or config.precision == "fp32":
        return {}
    name = torch.cuda.get_device_name()
    peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
    if peak is None:
        return {}
    texts = [samples.caption] + ([samples.summary] if config.model.summary_weight else [])
    tokens = sum(text.mean_length() for text in texts)
    batch = config.global_batch
    flops = step_flops(config.model, batch, round(tokens * batch)) / batch
    return {"mfu": flops * samples_per_second / (world()[1] * config.gpus_per_worker * peak * 1e12)}


class Watch:
    """Writes points of the curves by step, and prints a progress line every ten seconds.

    Args:
        config: settings of the training.
        store: the dataset.
        run: folder of the run below the dataset.
        steps: steps of an epoch.
        done: steps that were finished before this process started.
    """

    def __init__(self, config: TrainConfig, store: Store, run: str, steps: int, done: int):
        from ray.util.metrics import Gauge

        self.config, self.steps, self.total = config, steps, steps * config.epochs
        self.first, self.begun, self.last_line = done, time.monotonic(), time.monotonic()
        self.gauge = Gauge("ceca_train", "A curve of training", tag_keys=("model", "curve"))
        self.outlets = [OUTLETS[name](config, store, run, done) for name in config.watch]

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of a step, counted from 1 through all epochs."""
        for outlet in self.outlets:
            outlet.write(step, values)
        for name, value in values.items():
            self.gauge.set(value, tags={"model": self.config.name, "curve": name})

    def due(self) -> bool:
        """Whether it is time for another progress line."""
        return time.monotonic() - self.last_line >= 10

    def line(self, done: int, losses: Mapping[str, float]) -> None:
        """Print the progress of training."""
        self.last_line = now = time.monotonic()
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        epoch, step = divmod(done - 1, self.steps)
        terms = ", ".join(f"{name} {value:.2f}" for name, value in losses.items() if name != "loss")
        tell(
            f"{self.config.name}: epoch {epoch + 1}/{self.config.epochs} step {step + 1}/{self.steps}  {terms}  "
            f"{rate * self.config.global_batch:.0f} samples/s, {(self.total - done) / rate:.0f} s left"
        )

    def epoch(self, record: Mapping[str, float]) -> None:
        """Print the record of a finished epoch."""
        validation = f"  val Rank-1 {record['val_rank1']:.1f}" if "val_rank1" in record else ""
        tell(
            f"{self.config.name}: epoch {record['epoch']:.0f}/{self.config.epochs} done  loss {record['loss']:.2f}"
            f"{validation}  {record['samples_per_second']:.0f} samples/s, input wait {record['input_wait']:.0%}"
            + (f", {record['skipped_steps']:.0f} steps skipped" if record["skipped_steps"] else "")
        )

    def save(self) -> None:
        """Bring the curves to the store; called with every checkpoint."""
        for outlet in self.outlets:
            outlet.save()

    def close(self) -> None:
        for outlet in self.outlets:
            outlet.close()


class _TensorBoard:
    """Event files; for an object store they are written on this machine and copied."""

    def __init__(self, config: TrainConfig, store: Store, run: str, done: int):
        from torch.utils.tensorboard import SummaryWriter

        names = (MODELS, config.name, "curves", run.rsplit("run-", 1)[-1])
        self.store, self.target = store, store.path(*names)
        self.local = isinstance(store.fs, LocalFileSystem)
        self.folder = self.target if self.local else tempfile.mkdtemp(prefix="ceca-curves-")
        # A run that resumes from a checkpoint writes the later points again, so the old ones are purged.
        self.writer = SummaryWriter(self.folder, purge_step=done + 1 if done else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def save(self) -> None:
        self.writer.flush()
        if not self.local:
            for name in os.listdir(self.folder):
                self.store.fs.put_file(os.path.join(self.folder, name), f"{self.target}/{name}")

    def close(self) -> None:
        self.save()
        self.writer.close()


class _WandB:
    """Weights & Biases; project and key come from the WANDB_* variables."""

    def __init__(self, config: TrainConfig, store: Store, run: str, done: int):
        wandb = _library("wandb")
        identity = run.rsplit("run-", 1)[-1]
        project = os.environ.get("WANDB_PROJECT", "ceca")
        settings = to_mapping(config)
        self.run = wandb.init(project=project, name=config.name, id=identity, resume="allow", config=settings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def save(self) -> None:
        return None

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """MLflow; the server comes from MLFLOW_TRACKING_URI."""

    def __init__(self, config: TrainConfig, store: Store, run: str, done: int):
        self.mlflow = _library("mlflow")
        self.mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "ceca"))
        identity = run.rsplit("run-", 1)[-1]
        # A run that resumes continues the MLflow run of the same name.
        filters = f"attributes.run_name = '{config.name}-{identity}'"
        earlier = self.mlflow.search_runs(filter_string=filters, output_format="list")
        if earlier:
            self.mlflow.start_run(run_id=earlier[0].info.run_id)
        else:
            self.mlflow.start_run(run_name=f"{config.name}-{identity}")
            self.mlflow.log_params(_flat(to_mapping(config)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def save(self) -> None:
        return None

    def close(self) -> None:
        self.mlflow.end_run()


OUTLETS: dict[str, Callable[[TrainConfig, Store, str, int], Any]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--watch {name} needs the package {name} on the training nodes: pip install {name}") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
