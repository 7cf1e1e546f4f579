"""Which machines each kind of work may use.

A cluster may have machines for different work: with spot prices, with four GPUs, for people who wait. Their nodes then
have the label `ceca-pool`, and work names the pools that it may use. `ray_cluster.yaml` and
cluster/kubernetes/template/cluster.yaml set the label; tests/cluster/test_placement.py asks Ray where work lands.
"""

from __future__ import annotations

from typing import Literal, get_args

LABEL = "ceca-pool"
Pool = Literal["cpu", "dialogue", "train", "serve"]


def machines_for(*pools: Pool) -> dict[str, str]:
    """Ray's label selector for work that may use the machines of these pools.

    The selector names the other pools, which the work must not use. So a node without the label, on a cluster whose
    machines are all alike, takes any work.

    Args:
        pools: the pools that the work may use.
    """
    others = [pool for pool in get_args(Pool) if pool not in pools]
    return {LABEL: f"!in({', '.join(others)})"}
