"""The engine of a training worker: which one it is, how it is checkpointed and resumed with any number of workers.

Notable: ZeRO 0 and 1 have an engine of plain PyTorch (`plain`), whose steps cost the host less. DeepSpeed is for 2, 3
and offload, and for runs that it began. Its checkpoint has one file per rank; if the number of workers has changed,
it is first converted to DeepSpeed's universal form, which holds every parameter's state in one piece. DeepSpeed is
imported in one place, `import_deepspeed`; each of its habits that training must work around has its reason where it
is handled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import Tensor

from ceca.config import TrainConfig
from ceca.environment import cache_folder, temporary_folder
from ceca.errors import UserError
from ceca.model.ceca import CECA, HEADS
from ceca.model.mixer import GlobalBatchNorm
from ceca.training.curve import Curve
from ceca.training.optimiser import NO_SMALLER_SCALE, SkippingAdam, first_loss_scale, parameter_groups, rate_schedule
from ceca.training.plain import PlainEngine
from ceca.training.workers import MANY_WORKERS, world

MOST_IN_A_BUCKET = 2**26  # numbers that DeepSpeed reduces or gathers at once; of bf16, 134 MB
TAG = "state"  # the name under which DeepSpeed finds the state in a checkpoint


@dataclasses.dataclass
class Progress:
    """What a run has done so far; every checkpoint carries it.

    Attributes:
        steps: finished steps, counted through all epochs.
        history: one record per finished epoch: mean losses, rates, validation metrics.
        best: validation metrics of the best epoch so far and its number.
        workers: number of workers that wrote the checkpoint.
        zero_stage: ZeRO stage of the checkpoint.
        curve: the losses of every step.
        clean: which pairs of the present epoch are clean, in its order; None without a division.
        skipped: steps of `steps` that changed no weight, because a gradient was not finite.
    """

    steps: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: dict[str, float] | None = None
    workers: int = 1
    zero_stage: int = 0
    curve: Curve = dataclasses.field(default_factory=Curve)
    clean: np.ndarray | None = None
    skipped: int = 0

    def save(self, folder: Path) -> None:
        """Write progress.json, the curve as curve.parquet, and a division as clean.npy."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("curve", "clean")]
        (folder / "progress.json").write_text(json.dumps({name: getattr(self, name) for name in names}))
        pq.write_table(self.curve.table(), folder / "curve.parquet")
        if self.clean is not None:
            np.save(folder / "clean.npy", self.clean)

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Read what `save` wrote."""
        plain = json.loads((folder / "progress.json").read_text())
        clean = np.load(folder / "clean.npy") if (folder / "clean.npy").exists() else None
        return cls(**plain, curve=Curve.from_table(pq.ParquetFile(folder / "curve.parquet").read()), clean=clean)


def import_deepspeed(module: str = "deepspeed") -> Any:
    """Import DeepSpeed or one of its modules. Set DS_ACCELERATOR before the first call.

    The import also switches off the compilation of an all-reduce for CPUs. Inference alone uses that operation, and
    compiling it would add a minute to the first training on a machine.

    Args:
        module: full dotted name of the module.
    """
    communication: Any = importlib.import_module("deepspeed.comm.torch")
    communication.build_shm_op = lambda: None
    return importlib.import_module(module)


def takes_deepspeed(config: TrainConfig, checkpoint: Path | None = None) -> bool:
    """Whether a run needs DeepSpeed: for ZeRO 2, 3 and offload, or because its checkpoint is DeepSpeed's."""
    return config.zero_stage > 1 or config.offload or (checkpoint is not None and (checkpoint / TAG).is_dir())


def make_engine(model: CECA, config: TrainConfig, steps: int, checkpoint: Path | None = None) -> Any:
    """Build a `PlainEngine` or, where `takes_deepspeed` says so, a DeepSpeed engine around a model.

    Args:
        model: the model to train; it takes over `micro_batch` and `recompute` from the settings.
        config: the settings of the run.
        steps: number of steps in one epoch.
        checkpoint: the one that the run continues, if there is one.
    """
    model.micro_batch = config.micro_batch
    model.backbone.recompute = config.recompute
    if takes_deepspeed(config, checkpoint):
        return make_deepspeed(model, config, steps)
    return PlainEngine(model, config, steps)


def make_deepspeed(model: CECA, config: TrainConfig, steps: int) -> Any:
    """Build a DeepSpeed engine; arguments as `make_engine`."""
    optimiser = _make_optimiser(model, config)
    factor = rate_schedule(config.optimiser, config.epochs, steps)
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=optimiser,
        lr_scheduler=lambda optimiser: torch.optim.lr_scheduler.LambdaLR(optimiser, factor),
        config=deepspeed_config(config, sum(parameter.numel() for parameter in model.parameters())),
        dist_init_required=False,
    )
    keep_statistics_in_fp32(engine.module)
    if world()[1] == 1:
        _reduce_nothing(engine)
    return engine


def _reduce_nothing(engine: Any) -> None:
    """Keep DeepSpeed from copying every gradient into a buffer and back where there is one worker and no sum."""
    if engine.zero_optimization_stage() == 0:
        engine.enable_backward_allreduce = False
    elif not getattr(engine.optimizer, "contiguous_gradients", True):
        engine.optimizer.buffered_reduce_fallback = lambda *_, **__: None


def take_step(engine: Any) -> None:
    """Let the optimiser step, unless a gradient is not finite; all ranks call this after the backward pass.

    The device decides and the host does not wait, except with DeepSpeed in fp16, with ZeRO 3 and with offload: there
    it looks at the gradients itself. `skipped_steps` counts both.

    Args:
        engine: what `make_engine` returned.
    """
    if not isinstance(engine, PlainEngine):
        adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
        if isinstance(adam, SkippingAdam) and not engine.fp16_enabled() and engine.zero_optimization_stage() < 3:
            adam.look_at(_gradients(engine))
    engine.step()


def _gradients(engine: Any) -> list[Tensor]:
    """The gradients that DeepSpeed's optimiser of this rank is about to use."""
    if engine.zero_optimization_stage() == 0:
        return [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    groups = engine.optimizer.averaged_gradients.values()
    return [gradient for group in groups if group is not None for gradient in group if gradient is not None]


def skipped_steps(engine: Any) -> int:
    """Number of steps that were not taken, because a gradient was not finite. The host waits for the device."""
    if isinstance(engine, PlainEngine):
        return engine.skipped_steps()
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return max(int(engine.skipped_steps), int(adam.skipped) if isinstance(adam, SkippingAdam) else 0)


def _make_optimiser(model: CECA, config: TrainConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config.optimiser, config.global_batch)
    if not config.offload:
        return SkippingAdam(groups, config.optimiser)
    # The only optimiser with which DeepSpeed steps on the CPU. `adamw_mode=False` makes it Adam.
    operations = import_deepspeed("deepspeed.ops")
    compile_operation(operations.op_builder.CPUAdamBuilder())
    return operations.adam.DeepSpeedCPUAdam(
        groups, betas=config.optimiser.betas, eps=config.optimiser.epsilon, adamw_mode=False
    )


def compile_operation(builder: Any) -> None:
    """Compile one of DeepSpeed's operations, once per machine, and load it into this process.

    torch guards its build folder with a lock file. If the compiling process is killed, the file stays, and every later
    process waits for ever without a message. Our file lock ends with its process. The build folder is ours alone, so
    whoever holds our lock may delete torch's lock file: its process is dead.

    Args:
        builder: an operation builder of DeepSpeed: `name`, and `load()`, which compiles with torch.
    """
    place = cache_folder("extensions")
    with FileLock(place / f"{builder.name}.lock"), _environment_variable("TORCH_EXTENSIONS_DIR", str(place)):
        (place / builder.name / "lock").unlink(missing_ok=True)
        builder.load()


@contextlib.contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within a block; it has its previous value, or none, afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def deepspeed_config(config: TrainConfig, parameters: int = MOST_IN_A_BUCKET) -> dict[str, Any]:
    """The settings that DeepSpeed receives; it controls nothing else about training.

    Its checks of every single gradient are off where it lets them be off: they are two thirds of all operations that a
    step dispatches, and the host waits for their results. `take_step` checks all gradients at once.

    Args:
        config: the settings of the run.
        parameters: numbers in the model's parameters; no buffer for gradients is larger.
    """
    bucket = 2 * math.ceil(min(parameters, MOST_IN_A_BUCKET) / 2)  # DeepSpeed demands an even number
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": config.zero_stage > 1 or config.offload,  # else a copy of every gradient
    }
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.gpus_per_worker > 0}
    unchecked = config.zero_stage in (1, 2) and not config.offload
    if unchecked and not config.optimiser.gradient_clip:
        zero["compute_grad_norm"] = False
    settings: dict[str, Any] = {
        # A formality: one backward pass covers a worker's whole slice of the batch, whatever this number is.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": config.optimiser.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a step
    }
    if config.precision != "fp32":
        settings[config.precision] = {"enabled": True}
        if config.workers >= MANY_WORKERS:
            settings["communication_data_type"] = "fp32"
    if config.precision == "bf16" and unchecked:
        settings["bf16"]["check_grad_overflow"] = False
    if config.precision == "fp16":
        settings["fp16"]["initial_scale_power"] = first_loss_scale(config)
    return settings


@contextlib.contextmanager
def explained_overflow() -> Iterator[None]:
    """In this block, DeepSpeed's error about a loss scale that cannot get smaller becomes a UserError."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise UserError(NO_SMALLER_SCALE) from error


def keep_statistics_in_fp32(model: CECA) -> None:
    """Keep running means and variances in fp32: in bf16, their small updates would be rounded away."""
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):
            module.running_mean = module.running_mean.float()
            module.running_var = module.running_var.float()


def whole_model(engine: Any) -> CECA:
    """The model with all its parameters: the engine's own, or under ZeRO 3 a copy without the training heads.

    Under ZeRO 3 a worker holds a part of each parameter, and every forward pass is a collective. Workers with
    different numbers of validation batches would then wait for each other for ever.
    """
    model: CECA = engine.module
    if engine.zero_optimization_stage() < 3:
        return model
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith(HEADS)]
    with import_deepspeed().zero.GatheredParameters(parameters):
        state = {name: value.detach().clone() for name, value in model.published_state().items()}
    copy = CECA(model.config).to(parameters[0].device, parameters[0].dtype)
    keep_statistics_in_fp32(copy)
    copy.load_state_dict(state)
    return copy


def published_weights(engine: Any, model: CECA) -> dict[str, torch.Tensor]:
    """The weights to publish, in fp32; all ranks call this.

    The weights of a bf16 or fp16 model are rounded copies of the optimiser's fp32 weights, which are published.

    Args:
        engine: what `make_engine` returned.
        model: what `whole_model` returned for it.
    """
    state = {
        name: value.float() if value.is_floating_point() else value for name, value in model.published_state().items()
    }
    if isinstance(engine, PlainEngine):
        return state | {name: exact for name, exact in engine.weights().items() if name in state}
    full = import_deepspeed("deepspeed.utils").safe_get_full_fp32_param
    for name, parameter in engine.module.named_parameters():
        if name in state and (exact := full(parameter)) is not None:  # none without ZeRO
            state[name] = exact.reshape(state[name].shape)
    return state


# --- checkpoints ------------------------------------------------------------------------------------------


def save_checkpoint(engine: Any, progress: Progress, folder: Path) -> None:
    """Write a checkpoint; all ranks call this.

    Every rank writes its part of the state into its own folder, and rank 0 adds the progress.

    Args:
        engine: what `make_engine` returned.
        progress: what the run has done; this sets its `workers` and `zero_stage`.
        folder: this rank's folder.
    """
    rank, progress.workers = world()
    progress.zero_stage = engine.zero_optimization_stage()
    if isinstance(engine, PlainEngine):
        engine.save_checkpoint(folder)
    else:
        engine.skipped_steps = skipped_steps(engine)
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    if rank == 0:
        progress.save(folder)


def load_checkpoint(engine: Any, folder: Path, node: str = "alone") -> Progress:
    """Load a checkpoint into an engine; any number of workers may have written it.

    Args:
        engine: what `make_engine` returned.
        folder: the checkpoint.
        node: name of this machine among the nodes of the run; its workers share one converted copy.

    Raises:
        UserError: the checkpoint is from another ZeRO stage or was written without offload, or holds more than tensors
            and DeepSpeed's records.
    """
    progress = Progress.load(folder)
    stage = engine.zero_optimization_stage()
    if progress.zero_stage != stage:
        raise UserError(
            f"the last checkpoint is from ZeRO {progress.zero_stage} and this run has {stage}; resume with "
            f"--zero-stage {progress.zero_stage} or start anew under another --name"
        )
    if isinstance(engine, PlainEngine):
        with _only_tensors(folder):
            engine.load_checkpoint(folder)
        return progress
    if not (folder / TAG).is_dir():
        raise UserError("the last checkpoint was written without offload; resume without --offload")
    with _running_no_code(folder):
        if stage == 0 or progress.workers == world()[1]:
            engine.load_checkpoint(str(folder), tag=TAG)
        else:
            with _universal(folder, node) as universal:
                _load_universal(engine, universal)
                if world()[1] > 1:
                    torch.distributed.barrier()  # no worker may delete the folder before all have read it
    _restore_adam(engine)
    return progress


def _restore_adam(engine: Any) -> None:
    """Make a loaded Adam the kind that `take_step` needs; an older checkpoint may be of another kind."""
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if isinstance(adam, SkippingAdam):
        adam.skipped.fill_(float(engine.skipped_steps))
        for group in adam.param_groups:
            group.update(fused=True, foreach=None)
        for parameter, state in adam.state.items():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].to(parameter.device, torch.float32)


@contextlib.contextmanager
def _only_tensors(folder: Path) -> Iterator[None]:
    """In this block a file of the checkpoint that holds more than tensors is a UserError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the checkpoint {folder} holds more than tensors, and no code in it is run: it is damaged, or "
            f"somebody else wrote it; remove it and train again ({' '.join(str(error).split())[:200]})"
        ) from None


@contextlib.contextmanager
def _running_no_code(folder: Path) -> Iterator[None]:
    """In this block torch reads only tensors and DeepSpeed's records from files. DeepSpeed asks it to read anything.

    Raises:
        UserError: a file holds more.
    """
    scalers = import_deepspeed("deepspeed.runtime.fp16.loss_scaler")
    records = [
        *(scalers.LossScaler, scalers.DynamicLossScaler),
        import_deepspeed("deepspeed.runtime.zero.config").ZeroStageEnum,
        import_deepspeed("deepspeed.utils.tensor_fragment").fragment_address,
    ]
    with (
        _environment_variable("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0"),
        _environment_variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"),
        torch.serialization.safe_globals(records),
        _only_tensors(folder),
    ):
        yield


def _load_universal(engine: Any, folder: Path) -> None:
    """Load a universal checkpoint and repair what DeepSpeed gets wrong.

    DeepSpeed restores no buffers, and the statistics of the batch normalisation are buffers. Under ZeRO 3 it also gives
    every parameter group the settings of the first group. There all parameters share one step counter, which then
    counts each step several times.
    """
    groups = engine.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=TAG)
    finally:
        engine._config.load_universal_checkpoint = False
    for group, before, rate in zip(groups, settings, engine.lr_scheduler.get_last_lr(), strict=True):
        group.update(before, lr=rate)
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    saved = torch.load(min((folder / TAG).glob("*model_states.pt")), map_location="cpu", weights_only=True)["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


@contextlib.contextmanager
def _universal(folder: Path, node: str) -> Iterator[Path]:
    """Convert a checkpoint to DeepSpeed's universal form, once per node; the copy is deleted after the block."""
    converter = import_deepspeed("deepspeed.checkpoint.ds_to_universal")
    name = hashlib.sha256(f"{folder} {node}".encode()).hexdigest()[:16]
    place = temporary_folder("universal") / name
    with FileLock(f"{place}.lock"):
        if not (place / "done").exists():
            shutil.rmtree(place, ignore_errors=True)
            options = argparse.Namespace(
                input_folder=str(folder / TAG),
                output_folder=str(place / TAG),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                converter.main(options)
            (place / "done").touch()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
