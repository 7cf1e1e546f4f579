"""The curve of a training run: the loss of every step, term by term.

Notable: losses stay on their device until someone reads them, because reading one waits for the step that computes it.
The curve travels with every checkpoint, so a resumed run continues it.
"""

from __future__ import annotations

import math

import pyarrow as pa
import torch
from torch import Tensor

from ceca.errors import UserError


class Curve:
    """The loss terms of every step; one list of numbers per term, and the steps that are not read yet."""

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}
        self.pending: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        """Number of steps that were read."""
        return len(next(iter(self.columns.values()), ()))

    def add(self, terms: dict[str, Tensor]) -> None:
        """Append the loss terms of one step, scalars each."""
        self.pending.append({name: value.detach() for name, value in terms.items()})

    def flush(self) -> None:
        """Read the pending losses from their device."""
        if not self.pending:
            return
        names = list(self.pending[0])
        rows = torch.stack([torch.stack([terms[name] for name in names]) for terms in self.pending]).tolist()
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            self.columns.setdefault(name, []).extend(values)
        self.pending = []

    def mean(self, last: int) -> dict[str, float]:
        """The mean of each term over the last steps, and the sum of these means under `loss`."""
        self.flush()
        means = {name: sum(values[-last:]) / last for name, values in self.columns.items()}
        return {"loss": sum(means.values()), **means}

    def require_numbers(self, last: int, kept: int) -> None:
        """Check that the losses of the last steps are finite.

        Args:
            last: number of steps to look at.
            kept: steps of the last checkpoint; 0 if there is none.

        Raises:
            UserError: one is not; the message names the step, the term and the last checkpoint.
        """
        self.flush()
        first = max(0, len(self) - last)
        for step in range(first, len(self)):
            bad = [name for name, values in self.columns.items() if not math.isfinite(values[step])]
            if bad:
                good = f"the last good checkpoint is of step {kept}" if kept else "there is no checkpoint yet"
                raise UserError(
                    f"the loss is not a number from step {step + 1} on ({', '.join(bad)}); {good}. Lower the learning "
                    "rates or use precision fp32, under another --name"
                )

    def table(self) -> pa.Table:
        """The curve as a table, one row per step: `step` from 1, `loss`, and one column per term."""
        self.flush()
        total = [sum(values) for values in zip(*self.columns.values(), strict=True)]
        steps = list(range(1, len(total) + 1))
        return pa.table({"step": pa.array(steps, pa.int64()), "loss": pa.array(total, pa.float64()), **self.columns})

    @classmethod
    def from_table(cls, table: pa.Table) -> Curve:
        """Read what `table` returned."""
        curve = cls()
        curve.columns = {name: table[name].to_pylist() for name in table.column_names if name not in ("step", "loss")}
        return curve
