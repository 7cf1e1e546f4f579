"""cluster/kubernetes as a user's kubectl renders it, and its parts by name; shared by the tests of the manifests."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.conftest import REPOSITORY

TREE = REPOSITORY / "cluster" / "kubernetes"
GUIDE = REPOSITORY / "docs" / "kubernetes.md"
SCHEMAS = Path(__file__).parent / "schemas"
JOBS = ("jobs/dialogue", "jobs/train", "jobs/pipeline", "jobs/train-queued")
# What a user gives to `kubectl apply -k`.
APPLIED = ("base", "cluster", "service", "ingress", "gateway", "queue", *JOBS)

Object = dict[str, Any]


def render(folder: Path) -> list[Object]:
    command = [f"{Path(sys.executable).parent}/kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def _rendered(folder: str) -> list[Object]:
    return render(TREE / folder)


def rendered(folder: str) -> list[Object]:
    return copy.deepcopy(_rendered(folder))


def everything() -> list[Object]:
    """Every object that a user applies."""
    return [manifest for folder in APPLIED for manifest in rendered(folder)]


def one(folder: str, kind: str, name: str | None = None) -> Object:
    """The only object of this kind, and of this name if one is given."""
    (manifest,) = [
        manifest
        for manifest in rendered(folder)
        if manifest["kind"] == kind and name in (None, manifest["metadata"]["name"])
    ]
    return manifest


def ray_spec(owner: Object) -> Object:
    """Specification of the cluster of a RayCluster, RayJob or RayService."""
    spec = owner["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def ray_specs() -> list[Object]:
    return [ray_spec(manifest) for manifest in everything() if manifest["apiVersion"] == "ray.io/v1"]


def group(spec: Object, name: str) -> Object:
    (workers,) = [workers for workers in spec["workerGroupSpecs"] if workers["groupName"] == name]
    return workers


def nodes(spec: Object) -> list[Object]:
    """Pod templates of head and workers."""
    return [spec["headGroupSpec"]["template"], *(workers["template"] for workers in spec["workerGroupSpecs"])]


def ray_nodes() -> list[Object]:
    return [template for spec in ray_specs() for template in nodes(spec)]


def maps(value: Any) -> Iterator[Object]:
    """A value, if it is a mapping, and every mapping inside it."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from maps(inner)


def ways(value: Any, way: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields of a value, at every depth."""
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in named:
        yield (*way, str(name))
        yield from ways(inner, (*way, str(name)))


def pods() -> list[Object]:
    """Every pod template: Ray's nodes, the pods that submit jobs, Redis."""
    return [mapping for mapping in maps(everything()) if "containers" in (mapping.get("spec") or {})]


def containers(pod: Object) -> list[Object]:
    """All containers of a pod, those beside its work too."""
    return [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]


def gibibytes(quantity: str) -> float:
    units = {"Mi": 1 / 1024, "Gi": 1, "Ti": 1024}
    return float(quantity[:-2]) * units[quantity[-2:]]


def as_ray_reads(owner: Object) -> Object:
    """Node types of a cluster as Ray's autoscaler derives them."""
    cluster = {"metadata": {"name": "ceca", "namespace": "ceca"}, "spec": ray_spec(owner)}
    return _derive_autoscaling_config_from_ray_cr(cluster)
