"""The work of every training worker: steps over the global batch, validation, checkpoints.

A checkpoint is taken every `checkpoint_every` steps, after `checkpoint_minutes` and at the end of every epoch, and is
uploaded while training goes on. It carries the number of finished steps, so a run continues in the middle of an epoch
too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ceca.config import TrainConfig
from ceca.data.store import Store
from ceca.environment import temporary_folder
from ceca.errors import UserError
from ceca.metrics import better
from ceca.model.backbone import send
from ceca.model.ceca import CECA, Features
from ceca.model.weights import Start, serialize, start_model
from ceca.training.division import divide
from ceca.training.engine import (
    Progress,
    explained_overflow,
    import_deepspeed,
    load_checkpoint,
    make_engine,
    published_weights,
    save_checkpoint,
    skipped_steps,
    takes_deepspeed,
    whole_model,
)
from ceca.training.order import Batches
from ceca.training.precision import keep_freed_memory
from ceca.training.soft_labels import soft_labels
from ceca.training.step import batch_features, branch_losses, cawl, train_step
from ceca.training.workers import on_any_worker, world
from jobs.runtime.noise import tell, tell_warnings
from jobs.runtime.ray_session import quiet
from jobs.training.data import Run, TrainingSet, stream_batches
from jobs.training.images import kept_while_training
from jobs.training.validate import validate
from jobs.training.watch import Watch, model_flops_utilisation

HELD: list[FileLock] = []  # locks that end with this process
SELECTED_BY = ("rank1", "mean_average_precision")


def train_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker; `settings["run"]` is a Run."""
    tell_warnings()
    run: Run = settings["run"]
    config = run.config
    rank, size = world()
    device = _prepare_device(config, size)
    samples: TrainingSet = ray.get(run.samples)
    torch.manual_seed(config.seed)
    start = start_model(config.model, Store(run.store_uri))
    model = start.model
    if {"identity", "words"} & set(config.losses.terms):
        model.add_heads(samples.identities)
    batches = Batches.of(samples.visited, config)
    scratch = _scratch()
    with _last_checkpoint() as checkpoint:
        if takes_deepspeed(config, checkpoint):
            import_deepspeed()  # the accelerator is chosen
            quiet()
        engine = make_engine(model, config, len(batches), checkpoint)
        progress = _resume(engine, config, len(batches), checkpoint)
    if not progress.steps and config.model.pretrained is not None:
        _tell_start(start, config)
        if not start.at_random:
            _validate_the_start(engine, run, progress, device)
    if progress.steps < len(batches) * config.epochs:
        watch = Watch(config, Store(run.store_uri), run.run, len(batches), progress.steps) if rank == 0 else None
        try:
            with explained_overflow(), kept_while_training(run.images):
                _train(engine, run, progress, batches, device, watch, scratch)
        finally:
            if watch is not None:
                watch.close()


def _tell_start(start: Start, config: TrainConfig) -> None:
    """Say what the training starts from, and what of it is not used."""
    if world()[0] != 0:
        return
    rest = f"; at random: {', '.join(start.at_random)}" if start.at_random else ""
    rest += f"; it was trained with {', '.join(start.otherwise)}" if start.otherwise else ""
    tell(f"{config.name}: starts from {config.model.pretrained} ({start.kind}){rest}")
    if start.not_used:
        tell(f"{config.name}: not used of {config.model.pretrained}: {', '.join(sorted(start.not_used))}")


def _validate_the_start(engine: Any, run: Run, progress: Progress, device: torch.device) -> None:
    """Validate a model before its first step, as epoch 0: it is whole already, and may be the best."""
    metrics = _validate_and_keep_best(engine, run, progress, -1, device)
    if metrics:
        progress.history.append({"epoch": 0, **metrics})
        if world()[0] == 0:
            tell(f"{run.config.name}: before the first step  val Rank-1 {metrics['val_rank1']:.1f}")


def _prepare_device(config: TrainConfig, size: int) -> torch.device:
    """Choose DeepSpeed's accelerator and the device; on CPU also the number of threads."""
    on_gpu = config.gpus_per_worker > 0
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    quiet()
    if on_gpu:
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    keep_freed_memory()
    return torch.device("cpu")


def _train(
    engine: Any,
    run: Run,
    progress: Progress,
    batches: Batches,
    device: torch.device,
    watch: Watch | None,
    scratch: Path,
) -> None:
    """Take the steps that are left: watch them, validate at the end of an epoch, and save checkpoints."""
    config, steps = run.config, len(batches)
    stream = stream_batches(config, *world(), run.samples, run.images, progress.steps)
    engine.train()
    waited, begun, first = 0.0, time.perf_counter(), progress.steps
    kept, saved = progress.steps, time.monotonic()  # of the last checkpoint
    skipped = progress.skipped  # before this epoch
    while progress.steps < steps * config.epochs:
        epoch, step = divmod(progress.steps, steps)
        if step == 0 and config.division == "consensus":
            progress.clean = _divide(engine, stream, batches, config, epoch, device)
        before = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - before
        clean = _of_step(progress.clean, batches, step, device)
        features, identities, terms = train_step(engine, batch, config, epoch, step, device, batches.size(step), clean)
        progress.curve.add(terms)
        progress.steps += 1
        ends_epoch = step + 1 == steps
        checkpoints = ends_epoch or bool(config.checkpoint_every and progress.steps % config.checkpoint_every == 0)
        if config.checkpoint_minutes and progress.steps % config.log_every == 0:
            late = time.monotonic() - saved > 60 * config.checkpoint_minutes
            checkpoints = on_any_worker(late, device) or checkpoints
        if checkpoints or progress.steps % config.log_every == 0:
            progress.curve.require_numbers(config.log_every + steps, kept)
            _count_skipped(engine, progress, config)
        if watch is not None and (progress.steps % config.log_every == 0 or ends_epoch or watch.due()):
            _watch_step(watch, engine, progress, features, identities, config)
        if ends_epoch:
            seconds = time.perf_counter() - begun
            rate = (batches.samples - first % steps * config.global_batch) / seconds
            record = {
                "epoch": epoch + 1,
                **progress.curve.mean(steps),
                "learning_rate": float(engine.get_lr()[0]),
                "samples_per_second": rate,
                "input_wait": waited / seconds,
                "skipped_steps": progress.skipped - skipped,
                **model_flops_utilisation(config, ray.get(run.samples), rate),
            }
            if progress.clean is not None:
                record["clean"] = float(progress.clean.mean())
            if record["skipped_steps"] >= steps:
                raise UserError(
                    f"every step of epoch {epoch + 1} was skipped, because a gradient was not finite; lower the "
                    "learning rates or use precision fp32, under another --name"
                )
            record |= _validate_and_keep_best(engine, run, progress, epoch, device)
            progress.history.append(record)
            if watch is not None:
                watch.epoch(record)
                watch.point(progress.steps, {f"epoch/{name}": value for name, value in record.items()})
            waited, begun, first, skipped = 0.0, time.perf_counter(), progress.steps, progress.skipped
            engine.train()
        if checkpoints:
            kept, saved = progress.steps, time.monotonic()
            _checkpoint(engine, progress, watch, scratch, last=progress.steps == steps * config.epochs)


def _count_skipped(engine: Any, progress: Progress, config: TrainConfig) -> None:
    """Count the steps that were skipped since the last call, and say so."""
    skipped = skipped_steps(engine)
    if skipped > progress.skipped and world()[0] == 0:
        tell(
            f"{config.name}: {skipped - progress.skipped} steps up to step {progress.steps} were skipped, because a "
            f"gradient was not finite ({skipped} in all)"
        )
    progress.skipped = skipped


@torch.no_grad()
def _divide(
    engine: Any,
    stream: Iterator[dict[str, np.ndarray]],
    batches: Batches,
    config: TrainConfig,
    epoch: int,
    device: torch.device,
) -> np.ndarray:
    """Pass over an epoch's pairs without learning, and divide them into clean and noisy ones by their losses.

    Returns:
        [P] booleans in the order of the epoch, on every worker those of rank 0.
    """
    engine.eval()
    losses = []
    for step in range(len(batches)):
        batch = next(stream)
        features, identities = batch_features(engine, batch, config, epoch, step, device, batches.size(step))
        log_weights = soft_labels(batch, identities, config.losses)
        losses.append(branch_losses(features, identities, config.losses, log_weights))
    engine.train()
    clean = divide(torch.cat(losses, dim=1).cpu().numpy(), config.seed, epoch, config.division_fit)
    if world()[1] > 1:  # machines of different kinds may differ in the last digit
        shared = torch.from_numpy(clean).to(device, torch.uint8)
        torch.distributed.broadcast(shared, src=0)
        clean = shared.cpu().numpy().astype(bool)
    return clean


def _of_step(clean: np.ndarray | None, batches: Batches, step: int, device: torch.device) -> Tensor | None:
    """Which samples of a step are clean, [B]; None without a division."""
    if clean is None:
        return None
    first = step * batches.batch
    return send(torch.from_numpy(clean[first : first + batches.size(step)]), device)


@torch.no_grad()
def _watch_step(
    watch: Watch, engine: Any, progress: Progress, features: Features, identities: Tensor, config: TrainConfig
) -> None:
    """Add a point to every curve: losses, learning rates, gates, weights of CAWL."""
    last = progress.curve.mean(1)
    rates = engine.get_lr()
    values = {f"loss/{name}": value for name, value in last.items()}
    values |= {"rate/clip": float(min(rates)), "rate/new": float(max(rates)), "steps/skipped": progress.skipped}
    module: CECA = engine.module
    for side, mixer in (("image", module.visual_mixer), ("text", module.textual_mixer)):
        if mixer is not None and mixer.gate.numel():  # with ZeRO 3 it may lie on another worker
            values[f"gate/{side}"] = float(torch.sigmoid(mixer.gate.float()))
    if "cawl" in config.losses.terms:
        _, weights = cawl(features, identities, config.losses)
        for name, quantile in (("min", 0.0), ("median", 0.5), ("max", 1.0)):
            values[f"cawl_weight/{name}"] = float(weights.quantile(quantile))
    watch.point(progress.steps, values)
    if watch.due():
        watch.line(progress.steps, last)


def _validate_and_keep_best(
    engine: Any, run: Run, progress: Progress, epoch: int, device: torch.device
) -> dict[str, float]:
    """Validate after an epoch if it is due; rank 0 writes the weights to the store if they are the best so far.

    Returns the metrics with the prefix `val_`.
    """
    config = run.config
    last = epoch + 1 == config.epochs
    validates = run.validation is not None and config.validate_every > 0
    if not (last or (validates and (epoch + 1) % config.validate_every == 0)):
        return {}
    model = whole_model(engine)
    metrics = validate(model, run, device) if validates else {}
    if not validates or better(metrics, progress.best, SELECTED_BY):
        progress.best = {"epoch": epoch + 1, **metrics}
        state = published_weights(engine, model)
        if world()[0] == 0:
            Store(run.store_uri).write_bytes(serialize(state), run.run, f"best-{epoch + 1:04d}.safetensors")
    return {f"val_{name}": value for name, value in metrics.items()}


# --- checkpoints ------------------------------------------------------------------------------------------


def _scratch() -> Path:
    """An empty folder of this process for checkpoints until they are uploaded.

    Whoever makes one removes those of processes that were killed: nobody holds their locks.
    """
    folder = temporary_folder("checkpoints")
    for file in folder.glob("*.lock"):
        with contextlib.suppress(Timeout), FileLock(file, blocking=False):
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            file.unlink(missing_ok=True)
    place = folder / uuid.uuid4().hex
    held = FileLock(place.with_suffix(".lock"))
    held.acquire()
    HELD.append(held)
    place.mkdir(mode=0o700)
    return place


def _checkpoint(engine: Any, progress: Progress, watch: Watch | None, scratch: Path, *, last: bool) -> None:
    """Write this rank's part of a checkpoint; Ray Train uploads it while the next steps run.

    A checkpoint counts once the parts of all ranks are uploaded. The last checkpoint is uploaded before this returns.

    Raises:
        UserError: the disk is full.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        save_checkpoint(engine, progress, folder)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        free = shutil.disk_usage(scratch).free
        if free > 2**26:
            raise
        raise UserError(
            f"no room for a checkpoint in {scratch}: {free / 1e6:.0f} MB are left on its disk; make room there, or set "
            "TMPDIR on the nodes to a larger one"
        ) from error
    if watch is not None:
        watch.save()
    mode = ray.train.CheckpointUploadMode
    ray.train.report(
        progress.history[-1] if progress.history else {},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=mode.SYNC if last else mode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


@contextlib.contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    """The folder of this run's last checkpoint within the block; None if there is no checkpoint."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _resume(engine: Any, config: TrainConfig, steps: int, folder: Path | None) -> Progress:
    """Load a checkpoint, if there is one, and say where training continues."""
    if folder is None:
        return Progress()
    progress = load_checkpoint(engine, folder, ray.get_runtime_context().get_node_id())
    if world()[0] == 0:
        epoch, step = divmod(progress.steps, steps)
        place = f"after epoch {epoch}" if not step else f"after step {step} of epoch {epoch + 1}"
        workers = world()[1]
        moved = f", from {progress.workers} workers to {workers}" if progress.workers != workers else ""
        tell(f"{config.name}: resuming {place} of {config.epochs}{moved}")
    return progress
