"""The curve of training: losses of every step."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor


class Curve:
    """The loss of every step, term by term.

    Losses stay on their device until `flush`, for reading one would wait for the step that makes it.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}
        self.pending: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def add(self, terms: dict[str, Tensor]) -> None:
        self.pending.append({name: value.detach() for name, value in terms.items()})

    def flush(self) -> None:
        """Bring the pending losses to this process."""
        if not self.pending:
            return
        names = list(self.pending[0])
        rows = torch.stack([torch.stack([terms[name] for name in names]) for terms in self.pending]).tolist()
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            self.columns.setdefault(name, []).extend(values)
        self.pending = []

    def mean(self, last: int) -> dict[str, float]:
        """The mean of each term over the last steps, and of their sum under `loss`."""
        self.flush()
        means = {name: sum(values[-last:]) / last for name, values in self.columns.items()}
        return {"loss": sum(means.values()), **means}

    def table(self) -> pa.Table:
        """One row per step: `step` from 1, `loss`, and a column per term."""
        self.flush()
        total = [sum(values) for values in zip(*self.columns.values(), strict=True)]
        steps = list(range(1, len(total) + 1))
        return pa.table({"step": pa.array(steps, pa.int64()), "loss": pa.array(total, pa.float64()), **self.columns})

    @classmethod
    def from_table(cls, table: pa.Table) -> Curve:
        made = cls()
        made.columns = {name: table[name].to_pylist() for name in table.column_names if name not in ("step", "loss")}
        return made
