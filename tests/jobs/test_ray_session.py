"""How a command joins a cluster: by which address, and what it tells the cluster about itself."""

from __future__ import annotations

import json
import os

import pytest
from ray import cloudpickle

from ceca.environment import RAY_JOB_CONFIG
from ceca.errors import UserError
from jobs.runtime.ray_session import WORKERS, _options, connect

SECRETS = {"AWS_ACCESS_KEY_ID": "the-key-id", "AWS_SECRET_ACCESS_KEY": "the-secret", "AWS_SESSION_TOKEN": "the-token"}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RAY_JOB_CONFIG, raising=False)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_no_key_is_in_the_description_of_a_job_that_joins_a_cluster(keys, monkeypatch):
    options = _options("head:6379")
    hook = options["runtime_env"].pop("worker_process_setup_hook")
    described = json.dumps(options)
    assert not any(value in described for value in SECRETS.values())
    assert set(options["runtime_env"]["env_vars"]) == set(WORKERS)
    for name in SECRETS:
        monkeypatch.delenv(name)
    cloudpickle.loads(cloudpickle.dumps(hook))()  # as in a worker
    assert {name: os.environ[name] for name in SECRETS} == SECRETS


def test_a_submitted_job_and_ray_on_this_machine_pass_no_key_at_all(keys, monkeypatch):
    assert set(_options("")["runtime_env"]["env_vars"]) == set(WORKERS)
    monkeypatch.setenv(RAY_JOB_CONFIG, json.dumps({"runtime_env": {"env_vars": {"PYTHONWARNINGS": "default"}}}))
    options = _options("head:6379")
    assert options["runtime_env"] == {"env_vars": {n: v for n, v in WORKERS.items() if n != "PYTHONWARNINGS"}}


def test_an_address_without_a_cluster_is_told_before_ray_is_started(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"no cluster answers at RAY_ADDRESS='127\.0\.0\.1:9'"):
        connect()
