"""Environment variables: the one module that reads this project's own, each described in `VARIABLES`.

docs/environment.md lists them for users; a test compares that list with `VARIABLES`.

Variables of other programs are read or set where that program is used:

    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL     read in ceca/data/store.py; s3fs reads the other AWS_* variables itself
    AWS_*                                     passed on to Ray workers in jobs/runtime/ray_session.py, set in
                                              cluster/object_store.py
    RAY_JOB_CONFIG_JSON_ENV_VAR               read here and in jobs/runtime/ray_session.py; set by `ray job submit`
    RAY_ADDRESS                               read in jobs/runtime/ray_session.py and serve/__main__.py, set in
                                              cluster/local.py
    RAY_TMPDIR                                read in serve/__main__.py
    RAY_TRAIN_*, PYTHONWARNINGS               set in jobs/runtime/ray_session.py and jobs/train.py
    RAY_SERVE_*                               set in serve/proxy.py, cluster/local.py and cluster/kubernetes
    RAY_*, AUTOSCALER_*                       of a local cluster: set in cluster/local.py
    VLLM_CPU_KVCACHE_SPACE, VLLM_LOGGING_LEVEL, VLLM_NO_USAGE_STATS
                                              set in ceca/dialogue/vllm.py before vLLM is imported
    TORCH_EXTENSIONS_DIR                      set in ceca/training/engine.py while an operation is compiled
    DS_ACCELERATOR                            set in jobs/training/worker.py before DeepSpeed is imported
    WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME     read in jobs/training/watch.py
    OPENAI_API_KEY                            read in ceca/dialogue/openai.py; a setting can name another variable
    http_proxy, https_proxy, all_proxy, no_proxy
                                              read here, httpx and botocore read them themselves
"""

from __future__ import annotations

import ipaddress
import json
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from ceca.errors import UserError

Number = TypeVar("Number", int, float)

VARIABLES = {
    "CECA_CACHE": "Folder on this machine for files that can be made again: gallery shards, fetched dialogue models, "
    "compiled operations. Default: ~/.cache/ceca.",
    "CECA_LEASE_SILENT_S": "Seconds without a beat after which the holder of a name counts as dead. Must be the same "
    "on all machines. Default: 60.",
    "CECA_DECLARED_GPUS": "Set by `ceca cluster up --gpus`: nodes only declare GPUs, and workers compute on CPUs.",
    "CECA_LOCAL_CLUSTER": "Set by `ceca cluster up` in its processes: the cluster's folder, by which "
    "`ceca cluster down` finds them.",
}

RAY_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in processes that `ray job submit` started


def cache_folder(*names: str) -> Path:
    """Path of a folder below `CECA_CACHE`; the folder is not created.

    An empty variable counts as not set. On a machine without a home folder the default is a folder of this user below
    the temporary folder.

    Args:
        names: folders below the cache.
    """
    cache = os.environ.get("CECA_CACHE")
    if cache:
        return Path(cache, *names)
    try:
        return Path(Path.home(), ".cache", "ceca", *names)
    except RuntimeError:  # no home folder
        return Path(tempfile.gettempdir(), f"ceca-{os.getuid()}", *names)


def lease_silent_s() -> float:
    """Seconds without a beat after which the holder of a name counts as dead.

    Raises:
        UserError: the variable is not a positive, finite number.
    """
    value = os.environ.get("CECA_LEASE_SILENT_S") or "60"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"CECA_LEASE_SILENT_S must be a positive number of seconds, found {value!r}")
    return seconds


def usable_gpus(gpus: Number) -> Number:
    """Number of GPUs that a worker computes on: `gpus`, or 0 if a local cluster only declares its GPUs.

    Declared GPUs let Ray place work as on a real GPU cluster (cluster/local.py).
    """
    return 0 if os.environ.get("CECA_DECLARED_GPUS") else gpus


def ray_job_id() -> str:
    """Submission id of the Ray job that started this process; empty if none did."""
    job = json.loads(os.environ.get(RAY_JOB_CONFIG, "{}"))
    return job.get("metadata", {}).get("job_submission_id", "")


class Proxy(NamedTuple):
    """A proxy of the environment: the variable that names it, and its address without a password."""

    variable: str
    address: str


def is_loopback(url: str) -> bool:
    """Whether a URL is of this machine, so that no proxy may stand before it."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_loopback or address.is_unspecified
    except ValueError:  # a name, or no URL
        return False


def find_proxy(url: str) -> Proxy | None:
    """The proxy that the environment names for a URL; None if there is none, or `no_proxy` names the host."""
    scheme, _, rest = url.partition("://")
    proxies = urllib.request.getproxies()
    scheme = scheme if scheme in proxies else "all"
    if scheme not in proxies or urllib.request.proxy_bypass(rest.partition("/")[0].rpartition("@")[2]):
        return None
    kind, _, host = proxies[scheme].rpartition("@")
    address = f"{kind.partition('://')[0]}://***@{host}" if kind else host
    name = f"{scheme}_proxy"
    return Proxy(name if os.environ.get(name) else name.upper(), address)
