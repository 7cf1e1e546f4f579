"""Workers whose GPUs may be on several machines: Ray reserves a bundle for each GPU of a worker before it starts it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any


def bundles_of(gpus: int, cpus: float, accelerator_type: str | None) -> list[dict[str, float]]:
    """What a worker reserves: a bundle for each GPU, as vLLM's Ray executor wants it. The worker itself is in one.

    Args:
        gpus: GPUs of the worker.
        cpus: CPUs of the worker; as any bundle may be its own, each has them.
        accelerator_type: Ray's name of the kind of GPU; None takes any.
    """
    kind = {f"accelerator_type:{accelerator_type}": 0.001} if accelerator_type else {}
    return [{"GPU": 1.0, "CPU": cpus, **kind} for _ in range(gpus)]


@contextlib.contextmanager
def reserved(
    bundles: list[dict[str, float]], machines: dict[str, str], workers: int
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Reserve bundles for each of some workers, and give all of them back at the end.

    Args:
        bundles: of one worker. They are on as few machines as can be.
        machines: Ray's label selector of the machines.
        workers: number of workers. They must be started in one go.

    Yields:
        A function that returns Ray's options for the next worker. Ray Data also calls it to look at the options, before
        or after it starts the workers: so it reserves nothing itself, and goes round. A reservation without a worker
        could get the GPUs that a worker waits for.
    """
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    groups: list[PlacementGroup] = []
    turns = itertools.count()

    def options() -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(
            groups[next(turns) % workers], placement_group_capture_child_tasks=True
        )
        return {"scheduling_strategy": strategy}

    try:
        for _ in range(workers):
            groups.append(placement_group(bundles, strategy="PACK", bundle_label_selector=[machines] * len(bundles)))
        yield options
    finally:
        for group in groups:
            remove_placement_group(group)
