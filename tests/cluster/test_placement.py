"""Which machines each kind of work gets, asked of Ray's own scheduler over ray_cluster.yaml and cluster/kubernetes.

docs/placement.md is the table; a test compares it with the answers.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import yaml
from ray._private.label_utils import validate_label_selector
from ray._raylet import IMPLICIT_RESOURCE_PREFIX
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, GangResourceRequest, ResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator

from ceca.config import DialogueConfig, TrainConfig, VLLMConfig
from ceca.machines import LABEL, Pool, machines_for
from ceca.settings import from_mapping
from jobs.dialogues.engine import engine_workers
from jobs.runtime.spread import bundles_of
from jobs.training.data import training_machines
from serve.app import WAITING, replica_machines
from tests.cluster.manifests import as_ray_reads, one
from tests.conftest import REPOSITORY

GUIDE = REPOSITORY / "docs" / "placement.md"
POOLS: tuple[Pool, ...] = get_args(Pool)
Machines = dict[str, int]


@functools.cache
def _aws() -> dict[str, Any]:
    return prepare_config(yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text()))


@functools.cache
def _kubernetes() -> dict[str, Any]:
    return as_ray_reads(one("cluster", "RayCluster"))


def aws() -> dict[str, Any]:
    return copy.deepcopy(_aws())


def kubernetes() -> dict[str, Any]:
    return copy.deepcopy(_kubernetes())


CONFIGS = {"aws": aws, "kubernetes": kubernetes}


def types(config: dict[str, Any]) -> dict[str, NodeTypeConfig]:
    return AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()


def request(resources: dict[str, float], machines: dict[str, str]) -> ResourceRequest:
    """A request as Ray sends it to its autoscaler for a task, an actor or a part of a placement group."""
    assert validate_label_selector(machines) is None
    (selector,) = machines.values()
    names = re.fullmatch(r"!in\((.*)\)", selector)
    assert names
    constraint = (LABEL, LabelSelectorOperator.LABEL_OPERATOR_NOT_IN, names[1].split(", "))
    return ResourceRequestUtil.make(resources, label_selectors=[[constraint]])


def started(config: dict[str, Any], **demand: Any) -> Machines:
    """Number of machines by type that the autoscaler starts for these requests on an empty cluster."""
    asked = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types(config),
        max_num_nodes=config["max_workers"] + 1,
        **demand,
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(asked)
    assert not reply.infeasible_resource_requests
    assert not reply.infeasible_gang_resource_requests
    assert not reply.infeasible_cluster_resource_constraints
    launched = {launch.instance_type: launch.count for launch in reply.to_launch}
    launched.pop(config["head_node_type"], None)
    return launched


def single(config: dict[str, Any], requests: Sequence[ResourceRequest]) -> Machines:
    """Machines for requests that need not be together."""
    return started(config, resource_requests=ResourceRequestUtil.group_by_count(list(requests)))


def training(config: dict[str, Any], workers: int, **settings: Any) -> Machines:
    """Machines for the placement group of Ray Train."""
    made = from_mapping(TrainConfig, {"name": "any", "workers": workers, **settings}, "test")
    bundle = {"CPU": made.cpus_per_worker, **({"GPU": 1.0} if made.gpus_per_worker else {})}
    gang = GangResourceRequest(requests=[request(bundle, training_machines(made))] * workers)
    return started(config, gang_resource_requests=[gang])


def engines(config: dict[str, Any], count: int) -> Machines:
    """Machines for the actors of `ceca dialogue --replicas`."""
    vllm = DialogueConfig(engine="vllm").vllm
    bundle = {"CPU": 1.0, "GPU": float(vllm.gpus * vllm.tensor_parallel)}
    return single(config, [request(bundle, machines_for("dialogue"))] * count)


def spread_engine(config: dict[str, Any], gpus: int) -> Machines:
    """Machines for the placement group of one engine of `--vllm.several-machines`."""
    made = DialogueConfig(engine="vllm", vllm=VLLMConfig(tensor_parallel=gpus, several_machines=True))
    workers = engine_workers(made, made.images_per_part)
    assert workers.spread
    bundles = bundles_of(int(workers.gpus), workers.cpus, workers.accelerator_type)
    gang = GangResourceRequest(requests=[request(bundle, machines_for("dialogue")) for bundle in bundles])
    return started(config, gang_resource_requests=[gang])


def service(config: dict[str, Any], cpus: int, gpus: float) -> Machines:
    """Machines for two replicas of each kind of the service, on different nodes, and its intake (serve/app.py)."""
    computing = {"CPU": float(cpus), **({"GPU": gpus} if gpus else {})}
    kinds = {"encoder": computing, "search": computing, "ingress": {"CPU": WAITING}}
    own = {"ingress": machines_for("cpu", "serve")}
    replicas = [
        request({**resources, f"{IMPLICIT_RESOURCE_PREFIX}ceca:{kind}": 1.0}, own.get(kind, replica_machines(gpus)))
        for kind, resources in kinds.items()
        for _ in range(2)
    ]
    return single(config, [*replicas, request({"CPU": WAITING}, machines_for("cpu", "serve"))])


def ingest(config: dict[str, Any], tasks: int) -> Machines:
    return single(config, [request({"CPU": 1.0}, machines_for("cpu"))] * tasks)


WORK: dict[str, Callable[[dict[str, Any]], Machines]] = {
    "ingest, 40 tasks": lambda config: ingest(config, 40),
    **{f"dialogue --replicas {n}": functools.partial(engines, count=n) for n in range(1, 9)},
    "dialogue --vllm.tensor-parallel 2 --vllm.several-machines": functools.partial(spread_engine, gpus=2),
    **{f"train --workers {n}": functools.partial(training, workers=n) for n in (1, 2, 4, 8)},
    "train --workers 4 --gpus-per-worker 0": functools.partial(training, workers=4, gpus_per_worker=0),
    "service": functools.partial(service, cpus=1, gpus=0),
    "service, cpus 3, gpus 0.5": functools.partial(service, cpus=3, gpus=0.5),
}


def words(machines: Machines) -> str:
    return ", ".join(f"{machines[pool]} `{pool}`" for pool in POOLS if pool in machines)


@functools.cache
def answer(config: str, work: str) -> Machines:
    return WORK[work](CONFIGS[config]())


def test_the_table_of_the_guide_is_what_ray_s_scheduler_answers() -> None:
    answers = {work: [words(answer(config, work)) for config in CONFIGS] for work in WORK}
    rows = re.findall(r"^\| `?([^|`]+)`? \| (\d[^|]*) \| (\d[^|]*) \|$", GUIDE.read_text(), re.MULTILINE)
    assert {work: list(columns) for work, *columns in rows} == answers


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_training_is_on_its_own_machines_and_on_as_few_as_can_be(config: str, workers: int) -> None:
    assert answer(config, f"train --workers {workers}") == {"train": -(-workers // 4)}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("count", range(1, 9))
def test_each_engine_is_on_a_machine_of_dialogue(config: str, count: int) -> None:
    assert answer(config, f"dialogue --replicas {count}") == {"dialogue": count}


@pytest.mark.parametrize("config", CONFIGS)
def test_without_labels_training_would_be_on_machines_of_others(config: str) -> None:
    """The label decides, not sizes or the order of types."""
    bare = CONFIGS[config]()
    for kind in bare["available_node_types"].values():
        kind["labels"] = {}
    assert training(bare, 1) != {"train": 1}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pool", POOLS)
def test_when_a_pool_is_full_no_other_machine_starts_for_its_work(config: str, pool: Pool) -> None:
    """Ray Data asks for one more machine of the size of those that are busy, also beyond the limit of their type."""
    made = CONFIGS[config]()
    kind = made["available_node_types"][pool]
    size = {name: float(kind["resources"][name]) for name in ("CPU", "GPU") if kind["resources"].get(name)}
    for asked, enough in ((kind["max_workers"], True), (kind["max_workers"] + 1, False)):
        constraint = ClusterResourceConstraint()
        for _ in range(asked):
            constraint.resource_requests.add(request=request(size, machines_for(pool)), count=1)
        reply = ResourceDemandScheduler(event_logger=None).schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=types(made),
                max_num_nodes=100,
                cluster_resource_constraints=[constraint],
            )
        )
        assert bool(reply.infeasible_cluster_resource_constraints) != enough
        machines = {launch.instance_type for launch in reply.to_launch} - {made["head_node_type"]}
        assert machines == ({pool} if enough else set())


@pytest.mark.parametrize("config", CONFIGS)
def test_a_type_is_of_the_pool_of_its_name(config: str) -> None:
    made = CONFIGS[config]()
    labels = {name: kind.get("labels", {}) for name, kind in made["available_node_types"].items()}
    assert labels.pop(made["head_node_type"]) == {}
    assert labels == {pool: {LABEL: pool} for pool in POOLS}


def test_a_node_without_the_label_takes_all_work() -> None:
    alike = {name: kind for name, kind in aws()["available_node_types"].items() if name in ("head", "train")}
    alike["train"] |= {"labels": {}, "max_workers": 8}
    config = {**aws(), "available_node_types": alike}
    assert engines(config, 4) == {"train": 1}
    assert training(config, 4) == {"train": 1}
    assert ingest(config, 40) == {"train": 1}


def test_training_in_the_cloud_is_on_demand() -> None:
    machines = aws()["available_node_types"]
    spot = {name for name, kind in machines.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"cpu", "dialogue"}
