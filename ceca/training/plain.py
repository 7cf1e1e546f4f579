"""The training engine for ZeRO 0 and 1, of plain PyTorch: Adam on fp32 weights, its states divided with ZeRO 1.

Notable: the parameters of each of the optimiser's groups lie one after another in one buffer. A step then dispatches
a few operations per group instead of per parameter, and the workers exchange gradients and weights with one
collective per group. The host never waits for a result: whether gradients are finite, the loss scale of fp16 and the
factor of clipping stay on the device. A checkpoint holds the fp32 weights and Adam's states in the order of the
parameters, cut among the workers, so any number of workers can read it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ceca.config import TrainConfig
from ceca.errors import UserError
from ceca.model.ceca import CECA, Features
from ceca.training.optimiser import NO_SMALLER_SCALE, SkippingAdam, first_loss_scale, parameter_groups, rate_schedule
from ceca.training.workers import MANY_WORKERS, world

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_STEPS = 1000  # steps without an overflow after which fp16's loss scale doubles
REST = "plain.pt"  # the file of a checkpoint that is not cut among the workers
# torch 2.13 has other names for these.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Group:
    """One buffer with the parameters of one group of the optimiser. Each worker holds a share of it in fp32.

    Args:
        parameters: by name, fp32; they become views of the buffer.
        dtype: in which the model computes.
        shares: number of workers that divide the optimiser's states.
        rank: number of this worker's share.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype, shares: int, rank: int):
        self.parameters = parameters
        self.numbers = sum(parameter.numel() for parameter in parameters.values())
        share = math.ceil(self.numbers / shares)
        self.own = slice(rank * share, (rank + 1) * share)
        device = next(iter(parameters.values())).device
        self.padding = torch.zeros(shares * share - self.numbers, device=device)
        exact = self.flat([parameter.detach() for parameter in parameters.values()])
        self.whole = exact.to(dtype)  # [shares · share]
        self.weights = self.whole[self.own] if dtype == torch.float32 else exact[self.own].clone()  # [share] fp32
        self.weights.requires_grad_()
        for parameter, view in zip(parameters.values(), self.cut(self.whole), strict=True):
            parameter.data = view

    def flat(self, tensors: list[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes one after another, with padding: [shares · share]."""
        if len(self.padding):
            tensors = [*tensors, self.padding.to(tensors[0].dtype)]
        return _flatten_dense_tensors(tensors)

    def cut(self, flat: Tensor) -> list[Tensor]:
        """The inverse of `flat`: views of the parameters' shapes."""
        views: list[Tensor] = list(_unflatten_dense_tensors(flat, list(self.parameters.values())))
        return views

    def gradient(self) -> Tensor:
        """The gradients of the parameters, [shares · share]; 0 where there is none. The parameters' own are dropped."""
        parameters = list(self.parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return self.flat(gradients)


class PlainEngine:
    """A model with its optimiser, as `ceca.training.step.train_step` calls it. Every worker has one.

    Args:
        model: the model, in fp32 on its device; it computes in the configured precision from now on.
        config: settings of the training.
        steps: steps of one epoch.
    """

    def __init__(self, model: CECA, config: TrainConfig, steps: int):
        self.module, self.config = model.train(), config
        rank, self.size = world()
        self.shares = self.size if config.zero_stage else 1
        dtype = PRECISIONS[config.precision]
        groups = parameter_groups(model, config.optimiser, config.global_batch)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.groups = [
            _Group({names[p]: p for p in group["params"]}, dtype, self.shares, rank % self.shares) for group in groups
        ]
        self.optimizer = SkippingAdam(
            [{**group, "params": [of.weights]} for group, of in zip(groups, self.groups, strict=True)], config.optimiser
        )
        factor = rate_schedule(config.optimiser, config.epochs, steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        for parameter in model.parameters():  # those that are not trained; statistics stay in fp32
            parameter.data = parameter.data.to(dtype)
        self.sums_in_fp32 = self.size >= MANY_WORKERS
        device = self.optimizer.skipped.device
        self.scale: Tensor | None = None  # of the loss
        if config.precision == "fp16":
            self.scale = torch.tensor(2.0 ** first_loss_scale(config), device=device)
        self.kept = torch.zeros((), dtype=torch.int32, device=device)  # steps since the scale changed

    def __call__(self, *inputs: Any) -> Features:
        features: Features = self.module(*inputs)
        return features

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def get_lr(self) -> list[float]:
        """The learning rates of the groups."""
        return [float(rate) for rate in self.lr_scheduler.get_last_lr()]

    def zero_optimization_stage(self) -> int:
        return self.config.zero_stage

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, and let each worker have the mean of its share over all workers, in fp32."""
        (loss if self.scale is None else loss * self.scale).backward()
        for group in self.groups:
            total = group.gradient()
            if self.size > 1:
                total = (total.float() if self.sums_in_fp32 else total).div_(self.size)
                if self.shares == 1:
                    dist.all_reduce(total)
                else:
                    mean = torch.empty_like(total[group.own])
                    reduce_scatter(mean, total)
                    total = mean
            group.weights.grad = total.float()

    def step(self) -> None:
        """Take the step of Adam unless a gradient is not finite, and the next learning rate; all workers call this."""
        adam = self.optimizer
        gradients = [group.weights.grad for group in self.groups if group.weights.grad is not None]
        adam.grad_scale = self._divisor(adam.look_at(gradients))
        adam.step()
        for group in self.groups:
            group.weights.grad = None
        self._send_weights()
        if self.scale is not None:
            torch._amp_update_scale_(self.scale, self.kept, adam.found_inf, 2.0, 0.5, KEPT_STEPS)
        self.lr_scheduler.step()

    def _divisor(self, norms: Tensor) -> Tensor | None:
        """By which gradients are divided, given their norms: the loss scale times the factor of clipping."""
        if not self.config.optimiser.gradient_clip:
            return self.scale
        squares = norms.square().sum()
        if self.shares > 1:
            dist.all_reduce(squares)
        scale = torch.ones_like(squares) if self.scale is None else self.scale
        return scale * ((squares.sqrt() / scale + 1e-6) / self.config.optimiser.gradient_clip).clamp(min=1)

    @torch.no_grad()
    def _send_weights(self) -> None:
        """Give all workers the new weights of each share, in the precision of the computation."""
        for group in self.groups:
            own = group.whole[group.own]
            if own.dtype != torch.float32:
                own.copy_(group.weights)
            if self.shares > 1:
                all_gather(group.whole, own)

    def skipped_steps(self) -> int:
        """Number of steps that were not taken. The host waits for the device.

        Raises:
            UserError: fp16's loss scale is below 1, and gradients are still not finite.
        """
        if self.scale is not None and float(self.scale) < 1:
            raise UserError(NO_SMALLER_SCALE)
        return int(self.optimizer.skipped)

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights of all trained parameters by name; all workers call this."""
        return self.gathered([group.weights.detach() for group in self.groups])

    def gathered(self, shares: list[Tensor]) -> dict[str, Tensor]:
        """Tensors of the parameters' shapes by name, of this worker's shares of all groups; all workers call this."""
        found: dict[str, Tensor] = {}
        for group, share in zip(self.groups, shares, strict=True):
            whole = share
            if self.shares > 1:
                whole = torch.empty(len(group.whole), dtype=share.dtype, device=share.device)
                all_gather(whole, share)
            found |= dict(zip(group.parameters, group.cut(whole), strict=True))
        return found

    # --- checkpoints --------------------------------------------------------------------------------------

    def save_checkpoint(self, folder: Path) -> None:
        """Write this worker's share, if it has one of its own, and on rank 0 the rest."""
        rank, _ = world()
        if rank < self.shares:
            # A copy, because torch writes all that a view's memory holds, and this one's may hold all shares.
            shares = [{"weights": g.weights.detach().clone(), **self.optimizer.state[g.weights]} for g in self.groups]
            torch.save(shares, folder / f"share-{rank:05}.pt")
        if rank == 0:
            trained = {name for group in self.groups for name in group.parameters}
            rest = {
                "module": {name: value for name, value in self.module.state_dict().items() if name not in trained},
                "schedule": self.lr_scheduler.state_dict(),
                "skipped": self.optimizer.skipped,
                "scale": self.scale,
                "kept": self.kept,
            }
            torch.save(rest, folder / REST)

    @torch.no_grad()
    def load_checkpoint(self, folder: Path) -> None:
        """Read a checkpoint that any number of workers wrote."""
        shares = [
            torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            for file in sorted(folder.glob("share-*.pt"))
        ]
        for number, group in enumerate(self.groups):
            parts = [share[number] for share in shares]
            state = {}
            for name, value in parts[0].items():
                if value.ndim:
                    whole = torch.cat([part[name] for part in parts])[: group.numbers].to(group.whole.device)
                    whole = torch.cat([whole, group.padding])
                    if name == "weights":
                        group.whole.copy_(whole)
                    value = whole[group.own].clone()
                state[name] = value.to(group.whole.device)
            group.weights.copy_(state.pop("weights"))
            self.optimizer.state[group.weights] = state
        rest = torch.load(folder / REST, map_location=self.optimizer.skipped.device, weights_only=True)
        self.module.load_state_dict(rest["module"], strict=False)
        self.lr_scheduler.load_state_dict(rest["schedule"])
        self.optimizer.skipped, self.scale, self.kept = rest["skipped"], rest["scale"], rest["kept"]
        for settings, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            settings["lr"] = rate
