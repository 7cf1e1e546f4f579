"""This process in a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import ray

from ceca.environment import RAY_JOB_CONFIG

# What Ray's own processes would print among a stage's lines, unless it is set otherwise.
WORKERS = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
    "PYTHONWARNINGS": "ignore",  # of libraries about other libraries
}


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (as in `ray job submit`), else start Ray on this machine.

    On one machine the logical CPUs are at least eight, for the trainer's workers hold one each while others
    decode their images.
    """
    if not ray.is_initialized():
        for name, value in WORKERS.items():
            os.environ.setdefault(name, value)
        options: dict[str, Any] = {}
        if not os.environ.get("RAY_ADDRESS"):
            options = {"address": "local", "num_cpus": max(8, os.cpu_count() or 1)}
        elif RAY_JOB_CONFIG not in os.environ:
            # Workers on other machines reach the object store as this process does.
            names = [name for name in os.environ if name.startswith("AWS_") or name in WORKERS]
            options["runtime_env"] = {"env_vars": {name: os.environ[name] for name in names}}
        else:  # a submitted job brings its own
            brought = json.loads(os.environ[RAY_JOB_CONFIG]).get("runtime_env", {}).get("env_vars", {})
            own = {name: os.environ[name] for name in WORKERS if name not in brought}
            options["runtime_env"] = {"env_vars": own}
        ray.init(logging_level=logging.WARNING, log_to_driver=True, **options)
    quiet()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def quiet() -> None:
    """Keep Ray's libraries to warnings: a stage reports its own progress."""
    for name in ("ray.train.v2", "ray.data._internal.execution", "DeepSpeed", "botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    reports = sys.modules.get("ray.train.v2._internal.execution.context")
    if reports is not None and reports.__file__:  # Ray names this logger by its file
        logging.getLogger(reports.__file__).setLevel(logging.WARNING)
