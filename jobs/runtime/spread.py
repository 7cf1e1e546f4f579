"""Workers whose GPUs may be on several machines: Ray reserves a bundle for each GPU of a worker before it starts it."""

from __future__ import annotations

import contextlib
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
def reserved(bundles: list[dict[str, float]], machines: dict[str, str]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Reserve bundles for each worker that starts while this lasts, and give all of them back at the end.

    Args:
        bundles: of one worker. They are on as few machines as can be.
        machines: Ray's label selector of the machines.

    Yields:
        A function that reserves the bundles of one more worker and returns Ray's options for it.
    """
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    made: list[PlacementGroup] = []

    def options() -> dict[str, Any]:
        made.append(placement_group(bundles, strategy="PACK", bundle_label_selector=[machines] * len(bundles)))
        strategy = PlacementGroupSchedulingStrategy(made[-1], placement_group_capture_child_tasks=True)
        return {"scheduling_strategy": strategy}

    try:
        yield options
    finally:
        for group in made:
            remove_placement_group(group)
