"""Environment variables: the one module that reads those of this project, each with its meaning.

docs/environment.md lists them for users; a test compares that list with `VARIABLES`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TypeVar

from ceca.errors import UserError

Number = TypeVar("Number", int, float)

VARIABLES = {
    "CECA_CACHE": "Folder of this machine for what can be made again: shards of galleries, fetched dialogue models, "
    "compiled operations. Default: ~/.cache/ceca.",
    "CECA_LEASE_SILENT_S": "Seconds without a sign of life after which the holder of a name counts as dead; the same "
    "on all machines. Default: 60.",
    "CECA_DECLARED_GPUS": "Set by `ceca cluster up --gpus`: the nodes only declare GPUs, and workers compute on CPUs.",
}


def cache_folder(*names: str) -> Path:
    """A folder below `CECA_CACHE` (empty counts as not set); not created here.

    Where the home folder is missing, a folder of this user below the temporary one.
    """
    set_to = os.environ.get("CECA_CACHE")
    if set_to:
        return Path(set_to, *names)
    try:
        return Path(Path.home(), ".cache", "ceca", *names)
    except RuntimeError:  # no home folder
        return Path(tempfile.gettempdir(), f"ceca-{os.getuid()}", *names)


def lease_silent_s() -> float:
    """Seconds without a sign of life after which the holder of a name counts as dead.

    Raises:
        UserError: the variable is not a positive number.
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
    """GPUs that a worker computes on: the given number, or 0 where a local cluster only declares its GPUs.

    Declared GPUs let work find its node as on a real cluster (cluster/local.py).
    """
    return 0 if os.environ.get("CECA_DECLARED_GPUS") else gpus
