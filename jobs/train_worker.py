"""What every training worker does: DeepSpeed steps over the global batch, validation, checkpoints.

A checkpoint is DeepSpeed's own, written by every rank and kept by Ray Train on the store; it carries the number of
finished epochs, so a worker that starts finds where to go on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from ceca.config import TrainConfig
from ceca.datasets.images import decode_image
from ceca.errors import UserError
from ceca.metrics import retrieval_metrics
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA, fused_similarity
from ceca.model.mixer import GlobalBatchNorm
from ceca.model.weights import build_model, serialize
from ceca.store import Store
from ceca.training import (
    better,
    gather_features,
    gather_identities,
    loss_terms,
    parameter_groups,
    rate_factor,
    scaled_loss,
    world,
)
from ceca.transforms import augment_images, draw, generator, mask_words, normalize
from jobs import stages
from jobs.train_data import EncodedImages, stream_batches

TAG = "state"  # DeepSpeed's name of the one state in a checkpoint
OMEGA = 0.3  # of validation; evaluation sweeps it
SELECTED_BY = ("rank1", "mean_average_precision")


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a worker is told."""

    config: TrainConfig
    store_uri: str
    run: str  # folder of the run below the dataset
    samples: Any  # reference to a TrainingSet
    images: dict[int, Any]
    validation: Any | None  # reference to {"images": [(part, row, identity, summary)], "queries": [(text, identity)]}


@dataclasses.dataclass
class Progress:
    """What has been done; it travels with every checkpoint."""

    epochs: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: dict[str, float] | None = None
    workers: int = 1
    zero_stage: int = 0


def train_worker(settings: dict[str, Any]) -> None:
    """The function Ray Train runs on each worker."""
    run: Run = settings["run"]
    config = run.config
    on_gpu = config.gpus_per_worker > 0
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    import deepspeed  # after the accelerator is chosen

    stages.quiet()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if not on_gpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    rank, size = world()
    steps = len(ray.get(run.samples)) // config.global_batch
    optimiser = torch.optim.Adam(parameter_groups(model, config.optimiser), betas=config.optimiser.betas)
    warmup, total = config.optimiser.warmup_epochs * steps, config.epochs * steps
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimiser,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: rate_factor(step, warmup=warmup, total=total, start=config.optimiser.warmup_start)
        ),
        config=deepspeed_config(config, size),
        dist_init_required=False,
    )
    _keep_statistics_in_fp32(engine.module)
    progress = _resume(engine, config, size)
    if progress.epochs < config.epochs:
        batches = stream_batches(config, rank, size, run.samples, run.images, progress.epochs * steps)
        reporter = _Reporter(config, steps, progress.epochs) if rank == 0 else None
        for epoch in range(progress.epochs, config.epochs):
            record = _train_epoch(engine, batches, config, epoch, steps, device, reporter)
            record |= _validate_and_keep_best(engine, run, progress, epoch, device)
            progress.epochs = epoch + 1
            progress.history.append(record)
            if reporter is not None:
                reporter.epoch(record)
            _checkpoint(engine, progress, record)


def deepspeed_config(config: TrainConfig, workers: int) -> dict[str, Any]:
    """The settings DeepSpeed takes; everything else about training is ours."""
    settings: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.global_batch // workers,
        "gradient_clipping": config.optimiser.gradient_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.precision != "fp32":
        settings[config.precision] = {"enabled": True}
    return settings


def _keep_statistics_in_fp32(model: CECA) -> None:
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):  # a running mean in bf16 stops moving
            module.running_mean = module.running_mean.float()
            module.running_var = module.running_var.float()


# --- one epoch --------------------------------------------------------------------------------------------


def _train_epoch(
    engine: Any,
    batches: Iterator[dict[str, np.ndarray]],
    config: TrainConfig,
    epoch: int,
    steps: int,
    device: torch.device,
    reporter: _Reporter | None,
) -> dict[str, float]:
    engine.train()
    sums: dict[str, Tensor] = {}
    waited, started = 0.0, time.perf_counter()
    for step in range(steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        terms = _train_step(engine, batch, config, epoch, step, device)
        for name, value in terms.items():  # sums stay on the device: reading one would wait for the step
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
        if reporter is not None:
            reporter.step(epoch, step, sums)
    seconds = time.perf_counter() - started
    record = {name: float(value) / steps for name, value in sums.items()}
    return {
        "epoch": epoch + 1,
        "loss": sum(record.values()),
        **record,
        "learning_rate": float(engine.get_lr()[0]),
        "samples_per_second": steps * config.global_batch / seconds,
        "input_wait": waited / seconds,
    }


def _train_step(
    engine: Any, batch: dict[str, np.ndarray], config: TrainConfig, epoch: int, step: int, device: torch.device
) -> dict[str, Tensor]:
    rank, size = world()
    local = config.global_batch // size
    captions = torch.tensor(batch["caption"], dtype=torch.long)
    summaries: Tensor | None
    draws = draw(config.global_batch, captions.shape[1], generator(config.seed, epoch, step))
    draws = draws.rows(slice(rank * local, (rank + 1) * local))
    captions = mask_words(captions, draws, config.augmentation.word_mask)
    if config.model.summary_weight > 0:
        captions, summaries = trim(torch.cat([captions, torch.tensor(batch["summary"], dtype=torch.long)])).split(local)
        summaries = summaries.to(device)
    else:
        captions, summaries = trim(captions), None
    images = augment_images(torch.tensor(batch["image"]).to(device), draws, config.augmentation)
    images = images.to(next(engine.module.parameters()).dtype)
    features = engine(images, captions.to(device), summaries)
    identities = gather_identities(torch.tensor(batch["identity"]).to(device))
    terms = loss_terms(gather_features(features), identities, config.losses)
    engine.backward(scaled_loss(terms))
    engine.step()
    return terms


# --- validation -------------------------------------------------------------------------------------------


def _validate_and_keep_best(
    engine: Any, run: Run, progress: Progress, epoch: int, device: torch.device
) -> dict[str, float]:
    """Metrics on the validation images; the best model's weights go to the store from rank 0."""
    config = run.config
    last = epoch + 1 == config.epochs
    validates = run.validation is not None and config.validate_every > 0
    if not (last or (validates and (epoch + 1) % config.validate_every == 0)):
        return {}
    model = whole_model(engine)
    metrics = _validate(model, run, device) if validates else {}
    if not validates or better(metrics, progress.best, SELECTED_BY):
        progress.best = {"epoch": epoch + 1, **metrics}
        if world()[0] == 0:
            store = Store(run.store_uri)
            store.write_bytes(serialize(_float_state(model)), run.run, f"best-{epoch + 1:04d}.safetensors")
    return {f"val_{name}": value for name, value in metrics.items()}


def _float_state(model: CECA) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()}


def whole_model(engine: Any) -> CECA:
    """The model with all its parameters; a copy under ZeRO 3.

    There a worker holds a shard of them and every pass is a collective, so that workers with unequal numbers of
    validation batches would wait for each other for ever.
    """
    model: CECA = engine.module
    if engine.zero_optimization_stage() < 3:
        return model
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    copy = CECA(model.config).to(parameters[0].device, parameters[0].dtype)
    _keep_statistics_in_fp32(copy)
    copy.load_state_dict(state)
    return copy


@torch.no_grad()
def _validate(model: CECA, run: Run, device: torch.device, batch: int = 64) -> dict[str, float]:
    """Fused-similarity metrics; each worker embeds its share, rank 0 compares."""
    rank, size = world()
    validation = ray.get(run.validation)
    encoded = EncodedImages(run.images)
    model.eval()
    config, dtype = run.config.model, next(model.parameters()).dtype
    gallery, queries = [], []
    mine = validation["images"][rank::size]
    for start in range(0, len(mine), batch):
        rows = mine[start : start + batch]
        pixels = np.stack(
            [decode_image(encoded(row[0], row[1]), config.image_height, config.image_width) for row in rows]
        )
        images = normalize(torch.from_numpy(pixels).to(device)).to(dtype)
        summaries = trim(tokenize([row[3] for row in rows])).to(device)
        gallery.append([part.cpu() for part in model.embed_gallery(images, summaries)])
    texts = validation["queries"][rank::size]
    for start in range(0, len(texts), batch):
        ids = trim(tokenize([text for text, _ in texts[start : start + batch]])).to(device)
        queries.append([part.cpu() for part in model.embed_queries(ids)])
    own = (_join(gallery), [row[2] for row in mine], _join(queries), [identity for _, identity in texts])
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, own) if size > 1 else everyone.__setitem__(0, own)
    found: list[Any] = [None]
    if rank == 0:
        gallery_pairs = _join([part[0] for part in everyone if part[0]])
        query_pairs = _join([part[2] for part in everyone if part[2]])
        similarity = fused_similarity(query_pairs, gallery_pairs, OMEGA)  # type: ignore[arg-type]
        query_identities = np.concatenate([part[3] for part in everyone])
        gallery_identities = np.concatenate([part[1] for part in everyone])
        found = [retrieval_metrics(similarity, query_identities, gallery_identities).as_dict()]
    if size > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _join(pairs: list[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))


# --- checkpoints ------------------------------------------------------------------------------------------


def _checkpoint(engine: Any, progress: Progress, record: dict[str, float]) -> None:
    """Every rank writes its shard; Ray Train moves them to the store and keeps the last ones."""
    rank, size = world()
    progress.workers, progress.zero_stage = size, engine.zero_optimization_stage()
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=TAG, save_latest=False)
        if rank == 0:
            Path(folder, "progress.json").write_text(json.dumps(dataclasses.asdict(progress)))
        ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _resume(engine: Any, config: TrainConfig, size: int) -> Progress:
    """Load the last checkpoint of this run, where there is one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as folder:
        progress = Progress(**json.loads(Path(folder, "progress.json").read_text()))
        if (progress.workers, progress.zero_stage) != (size, config.zero_stage):
            raise UserError(
                f"the last checkpoint is from {progress.workers} workers with ZeRO {progress.zero_stage}; "
                f"resume with those (--workers {progress.workers} --zero-stage {progress.zero_stage}) "
                "or start anew under another --name"
            )
        engine.load_checkpoint(folder, tag=TAG)
    if world()[0] == 0:
        print(f"train: resuming after epoch {progress.epochs} of {config.epochs}", flush=True)
    return progress


class _Reporter:
    """Progress lines of rank 0, every ten seconds; Ray brings them to whoever started the job."""

    def __init__(self, config: TrainConfig, steps: int, first_epoch: int):
        self.config, self.steps = config, steps
        self.done, self.total = first_epoch * steps, config.epochs * steps
        self.first, self.begun, self.last_line = self.done, time.monotonic(), time.monotonic()

    def step(self, epoch: int, step: int, sums: dict[str, Tensor]) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last_line < 10:
            return
        self.last_line = now
        losses = ", ".join(f"{name} {float(value) / (step + 1):.2f}" for name, value in sums.items())
        rate = (self.done - self.first) / (now - self.begun)
        print(
            f"{self.config.name}: epoch {epoch + 1}/{self.config.epochs} step {step + 1}/{self.steps}  {losses}  "
            f"{rate * self.config.global_batch:.0f} samples/s, {(self.total - self.done) / rate:.0f} s left",
            flush=True,
        )

    def epoch(self, record: dict[str, float]) -> None:
        validation = f"  val Rank-1 {record['val_rank1']:.1f}" if "val_rank1" in record else ""
        print(
            f"{self.config.name}: epoch {record['epoch']}/{self.config.epochs} done  loss {record['loss']:.2f}"
            f"{validation}  {record['samples_per_second']:.0f} samples/s, input wait {record['input_wait']:.0%}",
            flush=True,
        )
