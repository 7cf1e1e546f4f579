"""This process in a Ray cluster. Ray is imported when a stage first needs it."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ceca.data.store import Store
from ceca.environment import RAY_JOB_CONFIG, cannot_join, hand_token_to_ray, ray_address, ray_folder
from jobs.runtime.console import divert_stderr, label
from jobs.runtime.noise import forward

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
# Environment of Ray's worker processes, unless it is set otherwise. Ray Train gives its processes all those variables
# that it reads itself. As others have the same ones, a process without work becomes Ray Train's, and none is started.
WORKERS = {
    "PYTHONWARNINGS": "ignore",  # warnings of libraries about other libraries
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line of a worker twice
    START_TIMEOUT: "1800",  # machines from an autoscaler take minutes; Ray Train gives up after one and starts anew
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's controller does
}


def connect(store: Store | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names (as in `ray job submit`), else start Ray on this machine.

    On one machine Ray gets at least eight logical CPUs: each worker of the trainer holds one while other processes
    decode the images.

    Args:
        store: the dataset that workers will use.

    Raises:
        UserError: there is no such cluster, or Ray does not start.
    """
    import ray

    if not ray.is_initialized():
        address = ray_address()
        options = _options(address)
        for name, value in WORKERS.items():
            os.environ.setdefault(name, value)
        _quiet_driver()
        try:
            ray.init(logging_level=logging.WARNING, log_to_driver=True, **options)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            if not address:
                raise
            raise cannot_join(address, error) from error
        if store is not None and isinstance(store.fs, LocalFileSystem):
            others = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} - {socket.gethostname()}
            if others:
                label(
                    "warning",
                    "yellow",
                    f"{store.uri} is a folder, and the cluster of RAY_ADDRESS has other machines ({min(others)}): each "
                    "must have this folder, e.g. by NFS; otherwise use s3://",
                )
    quiet()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _quiet_driver() -> None:
    """Keep messages of Ray and other libraries out of a command's output: they go to its log file."""
    from ray._private import worker

    log = divert_stderr()
    if log is not None:
        # Ray has no public way to choose among forwarded lines. If a later version does not look this function up
        # here, its lines are among the stage's again.
        worker.print_to_stdstream = forward(log, worker.print_to_stdstream)


def _options(address: str) -> dict[str, Any]:
    """Arguments of `ray.init` for this machine, a cluster, or a submitted job.

    Args:
        address: the cluster's; empty starts Ray on this machine.
    """
    if not address:
        hand_token_to_ray()
        own = {"num_cpus": max(8, os.cpu_count() or 1), "_temp_dir": ray_folder(), "include_dashboard": False}
        return {"address": "local", "runtime_env": {"env_vars": _worker_variables()}, **own}
    if RAY_JOB_CONFIG not in os.environ:
        return {"address": address, "runtime_env": {"env_vars": _worker_variables(), **_object_store()}}
    submitted = json.loads(os.environ[RAY_JOB_CONFIG]).get("runtime_env", {}).get("env_vars", {})
    env_vars = {name: value for name, value in _worker_variables().items() if name not in submitted}
    return {"address": address, "runtime_env": {"env_vars": env_vars}}


def _worker_variables() -> dict[str, str]:
    return {name: os.environ.get(name, value) for name, value in WORKERS.items()}


def _object_store() -> dict[str, Any]:
    """Let workers on other machines reach the object store as this process does, unless their machines know how to.

    The variables travel as a function's content. As `env_vars` they would be in the job's description, which Ray shows
    and writes to its logs.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def reach_object_store() -> None:
        os.environ.update(variables)

    return {"worker_process_setup_hook": reach_object_store} if variables else {}


def quiet() -> None:
    """Keep Ray's libraries to warnings: a stage reports its own progress."""
    for name in ("ray.train.v2", "ray.data._internal.execution", "DeepSpeed", "botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    reports = sys.modules.get("ray.train.v2._internal.execution.context")
    if reports is not None and reports.__file__:  # Ray names this logger by its file
        logging.getLogger(reports.__file__).setLevel(logging.WARNING)
