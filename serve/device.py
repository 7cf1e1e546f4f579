"""The device that an encoder or search replica computes on."""

from __future__ import annotations

import logging

import torch

from ceca.config import ServeConfig
from ceca.environment import usable_gpus


def replica_device(config: ServeConfig) -> torch.device:
    """Choose the device of a replica. On CPUs, torch gets one thread per CPU that the replica has reserved."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if usable_gpus(config.gpus):
        return torch.device("cuda")
    torch.set_num_threads(config.cpus or 1)
    return torch.device("cpu")
