"""What a step costs the host, counted: operations dispatched, and waits for the device.

Waits are found without a GPU by running on torch's device `meta`, whose tensors have shapes and no values: whoever
reads one gets an error, and `Waits` records copies to it that would not be asynchronous.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ceca.config import TrainConfig
from ceca.model.ceca import CECA, Features

READS = ("_local_scalar_dense", "nonzero", "equal.default")  # the host waits for the result of these


class Operations(TorchDispatchMode):
    """Counts the operations that compute something; views of tensors launch no kernel and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if not (function.is_view or "detach" in name or "_unsafe_view" in name):
            self.count[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.count.values())

    @property
    def reads(self) -> list[str]:
        """Operations after which the host waits for the device, if the tensors lie on one."""
        return [name for name in self.count if any(read in name for read in READS)]


class Waits(TorchDispatchMode):
    """Records copies from the host to the device `meta` for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.made = _Made(self.found)

    def __enter__(self) -> Waits:
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        copied = "copy" in function.__name__ and any(isinstance(a, Tensor) and a.device.type == "cpu" for a in args)
        if copied and result.device.type == "meta" and not (kwargs or {}).get("non_blocking"):
            self.found.append(str(function))
        return result


class _Made(TorchFunctionMode):
    """Records tensors that are made of the host's numbers on the device."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.device.type == "meta":
            self.found.append(function.__name__)
        return result


class MetaEngine:
    """A model on the device `meta` as `train_step` calls it. Its optimiser does nothing."""

    def __init__(self, config: TrainConfig):
        with torch.device("meta"):
            self.module = CECA(config.model).train()
            if {"identity", "words"} & set(config.losses.terms):
                self.module.add_heads(identities=6)
        self.optimizer = None
        self.backward = Tensor.backward

    def __call__(self, *inputs: Any) -> Features:
        features: Features = self.module(*inputs)
        return features

    def step(self) -> None:
        pass
