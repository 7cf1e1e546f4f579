"""What tests of jobs share."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.runtime import units
from jobs.runtime.team import Team

SMALL = ("--recipe", "tests/jobs/small.yaml")


@pytest.fixture(scope="session")
def ingested(run, drawn, tmp_path_factory) -> Path:
    """A dataset on disk with images and captions, in small parts, for tests that only read it or copy it."""
    data = tmp_path_factory.mktemp("ingested")
    run("ingest", *SMALL, "--source", drawn, "--data", data)
    return data


@pytest.fixture(scope="session")
def told(run, ingested) -> Path:
    """The same dataset with dialogues."""
    run("dialogue", *SMALL, "--data", ingested)
    return ingested


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


@pytest.fixture
def without_ray() -> Iterator[None]:
    """As `in_this_process`."""
    with in_this_process():
        yield


@pytest.fixture
def do(without_ray, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Do a stage in this process, without Ray, and give back what it says, on one line."""

    def do_stage(stage: str, *arguments: object) -> str:
        importlib.import_module(f"jobs.{stage}").main([str(argument) for argument in arguments])
        return " ".join(capsys.readouterr().err.split())

    return do_stage
