"""What a local cluster changes in Ray's provider of nodes, and that it changes it back."""

from __future__ import annotations

import ray._private.parameter

from cluster.nodes import _files_of_jobs_in


def folder_of_jobs_files() -> str:
    """Folder that a node started now would unpack the files of jobs into."""
    return ray._private.parameter.RayParams(num_cpus=2).runtime_env_dir_name


def test_a_node_has_a_folder_of_its_own_and_ray_s_default_comes_back() -> None:
    before = ray._private.parameter.RayParams
    try:
        with _files_of_jobs_in("runtime_resources_7"):
            assert folder_of_jobs_files() == "runtime_resources_7"
            raise MemoryError  # the default comes back when a node cannot start, too
    except MemoryError:
        assert ray._private.parameter.RayParams is before
    assert folder_of_jobs_files() == "runtime_resources"
