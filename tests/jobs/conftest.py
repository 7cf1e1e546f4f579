"""What tests of jobs share."""

from __future__ import annotations

import json

import pytest

from jobs.runtime import units
from jobs.runtime.team import Team


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units are done in this process, by the same workers: for tests of what a stage plans and publishes."""

    def run(store, plan, version, todo, workers):
        worker = units._UnitWorker(store.uri, plan.stage, version, plan.worker, dict(plan.arguments), Team())
        for unit in todo:
            result = worker({"unit": unit, "work": json.dumps(plan.units[unit])})
            assert not result["fatal"], result["fatal"]

    monkeypatch.setattr(units, "_run_units", run)
    monkeypatch.setattr(units, "connect", lambda store: None)
