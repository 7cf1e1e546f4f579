"""What a local cluster changes in Ray's provider of nodes, and that it puts it back."""

from __future__ import annotations

import pytest
import ray._private.parameter

from cluster.nodes import _files_of_jobs_in


def test_a_node_that_is_started_meanwhile_has_a_folder_of_its_own_and_later_ones_have_ray_s() -> None:
    before = ray._private.parameter.RayParams
    with pytest.raises(RuntimeError, match="no memory"), _files_of_jobs_in("runtime_resources_7"):
        assert ray._private.parameter.RayParams(num_cpus=2).runtime_env_dir_name == "runtime_resources_7"
        raise RuntimeError("no memory")
    assert ray._private.parameter.RayParams is before
    assert ray._private.parameter.RayParams().runtime_env_dir_name == "runtime_resources"
