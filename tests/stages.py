"""Stages in the process of a test, without Ray."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from jobs.runtime import units
from jobs.runtime.team import Team


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Units are done in this process, by the same workers: for tests of what a stage plans and publishes."""

    def run(store, plan, version, todo, workers):
        worker = units._UnitWorker(store.uri, plan.stage, version, plan.worker, dict(plan.arguments), Team())
        for unit in todo:
            result = worker({"unit": unit, "work": json.dumps(plan.units[unit])})
            assert not result["fatal"], result["fatal"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_run_units", run)
        patch.setattr(units, "connect", lambda store: None)
        yield
