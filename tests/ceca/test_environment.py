"""Environment variables: what each one means, what counts as not set, and which values are refused."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import pytest

from ceca.environment import (
    RAY_JOB_CONFIG,
    VARIABLES,
    cache_folder,
    lease_silent_s,
    ray_job_id,
    usable_gpus,
)
from ceca.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def test_the_cache_is_the_folder_that_the_variable_names(monkeypatch):
    monkeypatch.setenv("CECA_CACHE", "/somewhere/else")
    assert cache_folder("shards", "abc") == Path("/somewhere/else/shards/abc")
    assert cache_folder() == Path("/somewhere/else")


@pytest.mark.parametrize("value", [None, ""])
def test_a_cache_variable_that_is_empty_counts_as_not_set(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CECA_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("CECA_CACHE", value)
    assert cache_folder("models") == tmp_path / ".cache" / "ceca" / "models"
    assert not (tmp_path / ".cache").exists()


def test_without_a_home_folder_the_cache_is_a_folder_of_this_user_below_the_temporary_one(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CECA_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder("models") == Path(tempfile.gettempdir(), f"ceca-{os.getuid()}", "models")


@pytest.mark.parametrize(("value", "seconds"), [(None, 60.0), ("", 60.0), ("90", 90.0), ("0.5", 0.5)])
def test_a_holder_counts_as_dead_after_a_minute_or_the_seconds_given(monkeypatch, value, seconds):
    monkeypatch.delenv("CECA_LEASE_SILENT_S", raising=False)
    if value is not None:
        monkeypatch.setenv("CECA_LEASE_SILENT_S", value)
    assert lease_silent_s() == seconds


@pytest.mark.parametrize("value", ["a minute", "0", "-1", "inf", "nan", " "])
def test_seconds_that_cannot_be_used_are_an_error_that_names_the_variable(monkeypatch, value):
    monkeypatch.setenv("CECA_LEASE_SILENT_S", value)
    says = f"CECA_LEASE_SILENT_S must be a positive number of seconds, found {value!r}"
    with pytest.raises(UserError, match=re.escape(says)):
        lease_silent_s()


@pytest.mark.parametrize(("value", "usable"), [(None, (2, 0.5)), ("", (2, 0.5)), ("1", (0, 0))])
def test_gpus_that_are_only_declared_are_not_computed_on(monkeypatch, value, usable):
    monkeypatch.delenv("CECA_DECLARED_GPUS", raising=False)
    if value is not None:
        monkeypatch.setenv("CECA_DECLARED_GPUS", value)
    assert (usable_gpus(2), usable_gpus(0.5)) == usable


@pytest.mark.parametrize(
    ("config", "job"),
    [
        (None, ""),
        ({}, ""),
        ({"metadata": {"owner": "me"}}, ""),
        ({"metadata": {"job_submission_id": "raysubmit_1"}, "runtime_env": {}}, "raysubmit_1"),
    ],
)
def test_a_process_knows_the_ray_job_that_started_it(monkeypatch, config, job):
    monkeypatch.delenv(RAY_JOB_CONFIG, raising=False)
    if config is not None:
        monkeypatch.setenv(RAY_JOB_CONFIG, json.dumps(config))
    assert ray_job_id() == job


def test_every_variable_of_this_project_is_described():
    used = {
        name
        for package in ("ceca", "jobs", "serve", "cluster")
        for file in (REPOSITORY / package).rglob("*.py")
        for name in re.findall(r"\bCECA_[A-Z_]+\b", file.read_text())
    }
    assert used == set(VARIABLES)


def test_no_other_module_reads_the_variables_of_this_project():
    for package in ("ceca", "jobs", "serve", "cluster"):
        for file in (REPOSITORY / package).rglob("*.py"):
            if file != REPOSITORY / "ceca" / "environment.py":
                reads = re.findall(r"(?:environ(?:\.get)?|getenv)[\[(]\s*[\"']CECA_\w+", file.read_text())
                assert not reads, file
