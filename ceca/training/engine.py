"""The DeepSpeed engine of a training worker: made, checkpointed, and resumed with any number of workers.

A checkpoint is DeepSpeed's own, a file per rank, with our progress beside it. A worker group of another size first
turns it into DeepSpeed's universal form, in which every parameter's state is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from filelock import FileLock

from ceca.config import TrainConfig
from ceca.environment import cache_folder
from ceca.errors import UserError
from ceca.model.ceca import CECA, HEADS
from ceca.model.mixer import GlobalBatchNorm
from ceca.training.curve import Curve
from ceca.training.optimiser import parameter_groups, rate_schedule
from ceca.training.workers import world

TAG = "state"  # DeepSpeed's name of the one state in a checkpoint


@dataclasses.dataclass
class Progress:
    """What has been done; it travels with every checkpoint."""

    steps: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: dict[str, float] | None = None
    workers: int = 1
    zero_stage: int = 0
    curve: Curve = dataclasses.field(default_factory=Curve)

    def save(self, folder: Path) -> None:
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "curve"}
        (folder / "progress.json").write_text(json.dumps(plain))
        pq.write_table(self.curve.table(), folder / "curve.parquet")

    @classmethod
    def load(cls, folder: Path) -> Progress:
        plain = json.loads((folder / "progress.json").read_text())
        return cls(**plain, curve=Curve.from_table(pq.read_table(folder / "curve.parquet")))


def import_deepspeed() -> Any:
    """DeepSpeed, imported after the accelerator is chosen.

    It would compile an all-reduce on CPUs that inference alone uses: a minute of the first training on a machine.
    """
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def make_engine(model: CECA, config: TrainConfig, steps: int) -> Any:
    """A DeepSpeed engine around the model; `steps` are those of one epoch."""
    deepspeed = import_deepspeed()
    model.micro_batch = config.micro_batch
    model.backbone.recompute = config.recompute
    groups = parameter_groups(model, config.optimiser, config.global_batch)
    if config.offload:
        # DeepSpeed steps on the CPU with this one alone, which is Adam where the decay is not decoupled.
        compile_operation(deepspeed.ops.op_builder.CPUAdamBuilder())
        optimiser: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups, betas=config.optimiser.betas, eps=config.optimiser.epsilon, adamw_mode=False
        )
    else:
        optimiser = torch.optim.Adam(groups, betas=config.optimiser.betas, eps=config.optimiser.epsilon)
    factor = rate_schedule(config.optimiser, config.epochs, steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimiser,
        lr_scheduler=lambda optimiser: torch.optim.lr_scheduler.LambdaLR(optimiser, factor),
        config=deepspeed_config(config),
        dist_init_required=False,
    )
    _keep_statistics_in_fp32(engine.module)
    return engine


def compile_operation(builder: Any) -> None:
    """Compile one of DeepSpeed's operations, by the first process of a machine; DeepSpeed finds it loaded afterwards.

    torch guards its folder by a file, which stays when the process that compiles is killed: every later one would wait
    for it, for ever and without a word. Our lock ends with its process, and in a folder of our own, who holds it knows
    that torch's is a dead process's.
    """
    place = cache_folder("extensions")
    place.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with FileLock(place / f"{builder.name}.lock"):
        (place / builder.name / "lock").unlink(missing_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(place)
        try:
            builder.load()
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """The settings DeepSpeed takes; everything else about training is ours."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.gpus_per_worker > 0}
    settings: dict[str, Any] = {
        # Only for DeepSpeed's books: a step is one backward pass over a worker's share, however large.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": config.optimiser.gradient_clip,
        "zero_optimization": zero,
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


def whole_model(engine: Any) -> CECA:
    """The model with all its parameters; a copy under ZeRO 3, without the heads that only training needs.

    There a worker holds a shard of them and every pass is a collective, so that workers with unequal numbers of
    validation batches would wait for each other for ever.
    """
    model: CECA = engine.module
    if engine.zero_optimization_stage() < 3:
        return model
    import deepspeed

    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith(HEADS)]
    with deepspeed.zero.GatheredParameters(parameters):
        state = {name: value.detach().clone() for name, value in published_state(model).items()}
    copy = CECA(model.config).to(parameters[0].device, parameters[0].dtype)
    _keep_statistics_in_fp32(copy)
    copy.load_state_dict(state)
    return copy


def published_state(model: CECA) -> dict[str, torch.Tensor]:
    """The parameters and statistics that retrieval needs."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith(HEADS)}


# --- checkpoints ------------------------------------------------------------------------------------------


def save_checkpoint(engine: Any, progress: Progress, folder: Path) -> None:
    """Every rank writes its shard into its own folder, rank 0 also what has been done."""
    rank, progress.workers = world()
    progress.zero_stage = engine.zero_optimization_stage()
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    if rank == 0:
        progress.save(folder)


def load_checkpoint(engine: Any, folder: Path, node: str = "alone") -> Progress:
    """Continue from a checkpoint, whatever the number of workers that wrote it.

    Args:
        engine: what `make_engine` made.
        folder: the checkpoint.
        node: name of this machine among the nodes of the run; its workers share one converted copy.

    Raises:
        UserError: it is from another ZeRO stage.
    """
    progress = Progress.load(folder)
    stage = engine.zero_optimization_stage()
    if progress.zero_stage != stage:
        raise UserError(
            f"the last checkpoint is from ZeRO {progress.zero_stage} and this run has {stage}; resume with "
            f"--zero-stage {progress.zero_stage} or start anew under another --name"
        )
    if stage == 0 or progress.workers == world()[1]:
        engine.load_checkpoint(str(folder), tag=TAG)
        return progress
    with _universal(folder, node) as universal:
        _load_universal(engine, universal)
        if world()[1] > 1:
            torch.distributed.barrier()  # nobody clears the folder before all have read it
    return progress


def _load_universal(engine: Any, folder: Path) -> None:
    """Load a universal checkpoint, and what DeepSpeed leaves out of it.

    It restores no buffers, which hold the statistics of the batch normalisation, and under ZeRO 3 gives every
    parameter group the settings of the first and one tensor to count their steps, which then counts double.
    """
    groups = engine.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=TAG)
    finally:
        engine._config.load_universal_checkpoint = False
    for group, own, rate in zip(groups, settings, engine.lr_scheduler.get_last_lr(), strict=True):
        group.update(own, lr=rate)
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    saved = torch.load(min((folder / TAG).glob("*model_states.pt")), map_location="cpu", weights_only=False)["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


@contextlib.contextmanager
def _universal(folder: Path, node: str) -> Iterator[Path]:
    """The checkpoint in DeepSpeed's universal form, made once per node."""
    from deepspeed.checkpoint import ds_to_universal

    name = hashlib.sha256(f"{folder} {node}".encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"ceca-universal-{name}"
    with FileLock(f"{place}.lock"):
        if not (place / "done").exists():
            shutil.rmtree(place, ignore_errors=True)
            wanted = argparse.Namespace(
                input_folder=str(folder / TAG),
                output_folder=str(place / TAG),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                ds_to_universal.main(wanted)
            (place / "done").touch()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
