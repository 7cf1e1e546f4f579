"""Pods, clusters and jobs of cluster/kubernetes: what they may do, what they ask for, and what Ray makes of them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

import jobs.pipeline
from ceca.commandline import parse_arguments
from ceca.config import ServeConfig
from serve.environment import ENVIRONMENT
from tests.cluster.manifests import (
    GUIDE,
    JOBS,
    as_ray_reads,
    containers,
    gibibytes,
    group,
    nodes,
    one,
    pods,
    ray_nodes,
    ray_spec,
    ray_specs,
    rendered,
)
from tests.conftest import REPOSITORY

OBJECT_STORE = 0.3  # Ray's share of a pod's memory for its object store, which is in /dev/shm


# --- pods ------------------------------------------------------------------------------------------------


def test_the_namespace_refuses_what_is_not_restricted() -> None:
    labels = one("base", "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_pod_is_restricted() -> None:
    assert len(pods()) > 20
    for pod in pods():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(set(volume) <= {"name", "emptyDir", "secret"} for volume in pod["spec"].get("volumes", []))
        for container in containers(pod):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for spec in ray_specs():  # KubeRay adds the autoscaler's container
        if not spec["enableInTreeAutoscaling"]:
            continue
        assert spec["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_ray_s_pods_run_as_the_image_s_user() -> None:
    for pod in ray_nodes():
        security = pod["spec"]["securityContext"]
        assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {1000}


def test_every_container_says_what_it_needs_and_gets_no_more() -> None:
    for pod in pods():
        for container in containers(pod):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert set(requests) == set(limits) >= {"cpu", "memory"}
            assert requests["memory"] == limits["memory"]
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")


def test_ray_has_room_where_it_writes() -> None:
    for pod in ray_nodes():
        (container,) = pod["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert len(mounted) == len(volumes)
        assert mounted["/tmp/ray"] == {"name": "ray-logs", "emptyDir": {}}
        shared = mounted["/dev/shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        memory = gibibytes(container["resources"]["limits"]["memory"])
        assert OBJECT_STORE * memory < gibibytes(shared["sizeLimit"]) < 0.6 * memory


def test_every_node_has_what_the_service_needs_before_ray_starts() -> None:
    for pod in ray_nodes():
        (container,) = pod["spec"]["containers"]
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables.items() >= ENVIRONMENT.items()
        assert variables["RAY_LOGGER_LEVEL"] == "warning"  # else agents log a job's secrets


def test_pods_reach_the_object_store_by_an_account_and_workers_nothing_of_kubernetes() -> None:
    accounts = {each["metadata"]["name"]: each for each in rendered("base") if each["kind"] == "ServiceAccount"}
    assert all("eks.amazonaws.com/role-arn" in each["metadata"]["annotations"] for each in accounts.values())
    for spec in ray_specs():
        head, *workers = nodes(spec)
        assert head["spec"]["serviceAccountName"] == "ceca-head"  # its token is the autoscaler's
        for worker in workers:
            assert worker["spec"]["serviceAccountName"] == "ceca-worker"
            assert worker["spec"]["automountServiceAccountToken"] is False
    assert set(accounts) == {"ceca-head", "ceca-worker"}


# --- clusters --------------------------------------------------------------------------------------------


def test_ray_sees_a_head_without_work_and_four_kinds_of_workers_that_cost_nothing_when_idle() -> None:
    read = as_ray_reads(one("cluster", "RayCluster"))
    kinds = read["available_node_types"]
    head = kinds.pop(read["head_node_type"])
    assert head["resources"]["CPU"] == 0
    resources = {name: (kind["resources"]["CPU"], kind["resources"].get("GPU", 0)) for name, kind in kinds.items()}
    assert resources == {"cpu": (14, 0), "dialogue": (3, 1), "train": (44, 4), "serve": (7, 1)}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in kinds.values())
    assert read["idle_timeout_minutes"] == 10


def test_clusters_are_of_the_locked_ray_scale_and_ask_for_the_token() -> None:
    (version,) = re.findall(r"^ray==(\S+)", (REPOSITORY / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    for spec in ray_specs():
        assert spec["rayVersion"] == version
        if spec["enableInTreeAutoscaling"]:
            assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["authOptions"] == {"mode": "token", "secretName": "ceca-ray-token"}


def test_pods_with_gpus_tolerate_their_machines_taint_and_no_other_does() -> None:
    for pod in ray_nodes():
        (container,) = pod["spec"]["containers"]
        gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        tolerated = {each["key"] for each in pod["spec"].get("tolerations", [])}
        assert ("nvidia.com/gpu" in tolerated) == gpus
        assert ("nvidia.com/gpu.product" in pod["spec"].get("nodeSelector", {})) == gpus


def test_the_same_pods_are_in_all_clusters() -> None:
    standing = ray_spec(one("cluster", "RayCluster"))
    for folder in JOBS:
        spec = ray_spec(one(folder, "RayJob"))
        assert spec["headGroupSpec"] == standing["headGroupSpec"]
        for workers in spec["workerGroupSpecs"]:
            same = group(standing, workers["groupName"])
            assert workers["template"] == same["template"]
            assert workers["labels"] == same["labels"]


# --- jobs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", JOBS)
def test_a_job_has_its_own_cluster_and_leaves_nothing_behind(folder: str) -> None:
    spec = one(folder, "RayJob")["spec"]
    assert "clusterSelector" not in spec
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"]
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("folder", "kinds"),
    [
        ("jobs/dialogue", "cpu dialogue"),
        ("jobs/train", "cpu train"),
        ("jobs/pipeline", "cpu dialogue train"),
        ("jobs/train-queued", "train"),
    ],
)
def test_a_job_s_cluster_has_the_workers_of_its_stages(folder: str, kinds: str) -> None:
    assert [workers["groupName"] for workers in ray_spec(one(folder, "RayJob"))["workerGroupSpecs"]] == kinds.split()


def command(folder: str) -> list[str]:
    """Arguments of `python jobs/STAGE.py`; the file exists."""
    program, file, *arguments = shlex.split(one(folder, "RayJob")["spec"]["entrypoint"])
    assert program == "python"
    assert file == f"{folder.removesuffix('-queued')}.py"
    assert (REPOSITORY / file).is_file()
    return arguments


def test_the_dialogue_s_engines_find_their_gpus() -> None:
    arguments = parse_arguments("dialogue", command("jobs/dialogue"))
    config, kind = arguments.config, as_ray_reads(one("jobs/dialogue", "RayJob"))["available_node_types"]["dialogue"]
    assert arguments.data == "s3://bucket/cuhk"
    assert config.engine == "vllm"
    assert config.vllm.gpus * config.vllm.tensor_parallel == kind["resources"]["GPU"]
    assert 1 < config.replicas <= kind["max_workers"]


@pytest.mark.parametrize("folder", ["jobs/train", "jobs/train-queued"])
def test_the_training_s_workers_fill_one_pod(folder: str) -> None:
    arguments = parse_arguments("train", command(folder))
    config, kind = arguments.config, as_ray_reads(one(folder, "RayJob"))["available_node_types"]["train"]
    assert config.workers * config.gpus_per_worker == kind["resources"]["GPU"]
    each = config.cpus_per_worker + config.loaders_per_worker * config.cpus_per_loader
    assert config.workers * each <= kind["resources"]["CPU"]


def test_the_pipeline_s_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(jobs.pipeline, "pipeline", lambda *values: calls.append(values))
    jobs.pipeline.main(command("jobs/pipeline"))
    assert calls == [("s3://bucket/cuhk", "s3://bucket/raw/CUHK-PEDES", "cuhk_pedes", "ceca-vitb16")]


def test_the_operator_waits_for_a_new_head_as_long_as_for_the_first() -> None:
    """KubeRay fails a job that has no status for so long, and does not retry it then."""
    name, waits = re.findall(r"--set 'env\[0\]\.name=(\S+)' --set-string 'env\[0\]\.value=(\d+)'", GUIDE.read_text())[0]
    assert name == "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS"
    for folder in JOBS:
        assert int(waits) == one(folder, "RayJob")["spec"]["preRunningDeadlineSeconds"]


def test_a_lost_head_is_noticed_before_kuberay_s_own_limit() -> None:
    """An operator without the setting of the guide waits 300 s."""
    noticed = 50  # seconds until Kubernetes calls a machine unreachable, at most
    for spec in ray_specs():
        head = spec["headGroupSpec"]["template"]["spec"]
        waits = {each["key"]: each.get("tolerationSeconds") for each in head["tolerations"]}
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
            assert noticed + waits[key] < 300 / 2


def test_a_pod_ends_after_its_longest_request() -> None:
    for spec in ray_specs():
        for workers in spec["workerGroupSpecs"]:
            pod = workers["template"]["spec"]
            (_, _, script) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            waits = int(re.fullmatch(r"sleep (\d+); ray stop", script)[1])  # type: ignore[index]
            assert ServeConfig().timeout_s < waits < pod["terminationGracePeriodSeconds"] - 20


def test_a_queued_job_is_of_fixed_size_and_fits_its_queue() -> None:
    """Kueue admits a RayJob that does not autoscale and ends its cluster; the quota holds all of its pods."""
    job = one("jobs/train-queued", "RayJob")
    queue, classes = one("queue", "LocalQueue"), [each for each in rendered("queue") if "value" in each]
    labels, spec = job["metadata"]["labels"], ray_spec(job)
    assert labels["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert labels["kueue.x-k8s.io/priority-class"] in {each["metadata"]["name"] for each in classes}
    assert spec["enableInTreeAutoscaling"] is False
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    (workers,) = spec["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    cluster_queue = one("queue", "ClusterQueue")
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    ((group_,),) = [[each] for each in cluster_queue["spec"]["resourceGroups"]]
    quota = {each["name"]: each["nominalQuota"] for each in group_["flavors"][0]["resources"]}
    assert list(quota) == group_["coveredResources"], "Kueue asks for the same order"
    assert "clusterSelector" not in job["spec"]
    assert "head" not in {workers["groupName"]}, "Kueue's own name of the head's pods"
    pods_ = [nodes(spec)[0], *[workers["template"]] * workers["replicas"], job["spec"]["submitterPodTemplate"]]
    asked = [container["resources"]["requests"] for pod in pods_ for container in containers(pod)]
    assert set().union(*asked) <= set(quota)
    for name, most in quota.items():
        assert 2 * sum(amount(each.get(name, "0")) for each in asked) <= amount(most)


def amount(quantity: Any) -> float:
    """A quantity of Kubernetes as a number; bytes in GiB."""
    text = str(quantity)
    return gibibytes(text) if text.endswith("i") else float(text[:-1]) / 1000 if text.endswith("m") else float(text)
