"""Workers of a stage that are lost, and what becomes of their units.

A lost worker gives its units back, and others do them. It would take one unit after the other and give each back at
once, so it keeps those that it has until all other workers are idle.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ceca.errors import UserError
from jobs.runtime.console import label

IDLE_S = 1.0  # between two questions whether the other workers are idle


class WorkerLost(UserError):
    """This worker cannot work any more, and another one may: its engine does not start, or has died too often."""


class Team:
    """The workers of a stage as each of them sees the others.

    Args:
        busy: a Ray actor of `_Busy`; None if no worker looks at the others.
    """

    def __init__(self, busy: Any = None):
        self.busy = busy

    @classmethod
    def start(cls) -> Team:
        """A team whose workers see each other."""
        import ray

        return cls(ray.remote(_Busy).options(num_cpus=0, max_restarts=-1).remote())

    def begin(self, unit: int) -> None:
        """Say that a worker does this unit."""
        self._call("begin", unit)

    def end(self, unit: int) -> None:
        """Say that it does it no more."""
        self._call("end", unit)

    def wait_until_idle(self) -> None:
        """Wait until no worker does a unit."""
        while self._call("units"):
            time.sleep(IDLE_S)

    def _call(self, method: str, *arguments: int) -> Any:
        if self.busy is None:
            return None
        import ray

        try:
            return ray.get(getattr(self.busy, method).remote(*arguments))
        except ray.exceptions.RayActorError:  # its node is lost, and it starts anew without units
            return None


class _Busy:
    """The units that are being done."""

    def __init__(self) -> None:
        self.doing: set[int] = set()

    def begin(self, unit: int) -> None:
        self.doing.add(unit)

    def end(self, unit: int) -> None:
        self.doing.discard(unit)

    def units(self) -> list[int]:
        return sorted(self.doing)


class Lost:
    """Keeps account of lost workers and of the units that they give back.

    Args:
        stage: name of the stage, for messages.
        replicas: workers at the start.
    """

    def __init__(self, stage: str, replicas: int):
        self.stage, self.replicas = stage, replicas
        self.reasons: dict[str, str] = {}  # of each lost worker
        self.given_back: list[int] = []
        self.finished = 0  # units since the round began
        self.idle_rounds = 0  # rounds in a row that finished no unit

    def gives_back(self, result: Mapping[str, Any]) -> bool:
        """Whether a result is a unit that comes back undone.

        Raises:
            UserError: a worker raised it, or no worker is left.
        """
        if result["fatal"]:
            raise UserError(result["fatal"])
        if not result["lost"]:
            self.finished += 1
            return False
        self.given_back.append(result["unit"])
        if result["worker"] not in self.reasons:
            self.reasons[result["worker"]] = result["lost"]
            if len(self.reasons) >= self.replicas:
                self._stop()
            label("warning", "yellow", f"{self.stage}: a worker is lost, and others do its units: {result['lost']}")
        return True

    def take_units(self) -> list[int]:
        """The units that came back in the round that has ended, for the next one.

        Raises:
            UserError: no unit was finished in this round and the one before.
        """
        back, self.given_back = self.given_back, []
        self.idle_rounds = 0 if self.finished else self.idle_rounds + 1
        if back and self.idle_rounds > 1:  # a machine on its way may have missed the first of them
            self._stop()
        self.finished = 0
        return back

    def _stop(self) -> None:
        *_, last = self.reasons.values()
        number = len(self.reasons)
        raise UserError(
            last if number == 1 else f"{self.stage}: no worker is left; the last of {number} lost ones: {last}"
        )
