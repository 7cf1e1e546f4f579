"""Two ways to make a training step fast on a CPU: gradients from bf16 products, and memory that stays allocated.

Notable: the forward pass is fp32, so the loss is exactly that of fp32. The two matrix products of a linear layer's
gradient take two thirds of a step; in bf16 they run at the speed of the CPU's bf16 instructions, where it has them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


class BF16Backward(TorchFunctionMode):
    """A context in which linear layers compute as usual and keep their input in bf16 for the gradient.

    Gradients have the precision type of their layer, with values rounded to bf16's eight bits; sums are taken in fp32.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and torch.is_grad_enabled():
            return _Linear.apply(*_arguments(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


class _Linear(torch.autograd.Function):
    """A linear layer whose two gradient products are computed in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x.bfloat16(), weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        low = rows.bfloat16()
        needs = ctx.needs_input_grad
        to_x = (low @ weight.bfloat16()).to(gradient.dtype).view_as(x) if needs[0] else None
        to_weight = (low.T @ x.flatten(0, -2)).to(weight.dtype) if needs[1] else None
        return to_x, to_weight, rows.sum(0) if ctx.has_bias and needs[2] else None


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, because every training step allocates the same sizes again.

    By default, glibc returns large blocks to the system, and a tenth of a step is spent on clearing new pages. With
    another C library this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 * 2**20)):
            mallopt(option, value)
