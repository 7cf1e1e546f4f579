"""GPUs that a local cluster only declares."""

from __future__ import annotations

import os
from typing import TypeVar

Number = TypeVar("Number", int, float)


def gpus_there(gpus: Number) -> Number:
    """Of so many that a worker asks for, those that it computes on: none where a local cluster only declares them, so
    that work finds its way to a node as on a real one (cluster/local.py)."""
    return 0 if os.environ.get("CECA_DECLARED_GPUS") else gpus
