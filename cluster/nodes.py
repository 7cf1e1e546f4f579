"""Nodes that are processes of one machine, for Ray's autoscaler (`provider: {type: external}`)."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import ray._private.parameter
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalNodes(FakeMultiNodeProvider):
    """Ray's own, but each node unpacks what a job brings into a folder of its own, and one that has died is gone.

    Ray's share that folder, and a node that starts unpacks the job's files anew: for a moment they are gone under
    whoever works in them. And Ray's count for ever towards the most nodes there may be.
    """

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self.lock:
            for node_id, known in list(self._nodes.items()):
                if "node" in known and any(kind == PROCESS_TYPE_RAYLET for kind, _ in known["node"].dead_processes()):
                    self.terminate_node(node_id)
            return super().non_terminated_nodes(tag_filters)

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        with self.lock:
            own = functools.partial(
                ray._private.parameter.RayParams, runtime_env_dir_name=f"runtime_resources_{self._next_node_id + 1}"
            )
            with mock.patch.object(ray._private.parameter, "RayParams", own):
                super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
