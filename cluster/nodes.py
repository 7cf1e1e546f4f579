"""Nodes that are processes of one machine, for Ray's autoscaler (`provider: {type: external}`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import ray._private.parameter
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalNodes(FakeMultiNodeProvider):
    """Ray's provider of nodes that are processes, with two corrections.

    - Each node unpacks the files of a job into a folder of its own. Ray's nodes share one folder, and a node that
      starts unpacks the files again: for a moment they are missing for the work that uses them.
    - A node that has died is removed. Ray's provider counts it towards the most nodes for ever.
    """

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self.lock:
            for node_id, record in list(self._nodes.items()):
                # The head's record has no "node": Ray starts it elsewhere.
                if "node" in record and any(kind == PROCESS_TYPE_RAYLET for kind, _ in record["node"].dead_processes()):
                    self.terminate_node(node_id)
            return super().non_terminated_nodes(tag_filters)

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        with self.lock, _files_of_jobs_in(f"runtime_resources_{self._next_node_id + 1}"):
            super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)


@contextlib.contextmanager
def _files_of_jobs_in(folder: str) -> Iterator[None]:
    """Let nodes started in this context unpack the files of jobs into this folder of Ray's session.

    Ray's provider makes a node's parameters itself (`ray._private.parameter.RayParams(…)`) and has no option for the
    folder. So that name stands for the same class with the folder set, until the context ends.

    Args:
        folder: name of the folder (`runtime_env_dir_name` of RayParams).
    """
    parameters = ray._private.parameter.RayParams
    ray._private.parameter.RayParams = functools.partial(parameters, runtime_env_dir_name=folder)
    try:
        yield
    finally:
        ray._private.parameter.RayParams = parameters
