"""cluster/kubernetes: rendered by kustomize as a user's kubectl does it, and held against the published schemas, in
which a field that they do not know is an error."""

from __future__ import annotations

import ast
import copy
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator.v1 import PodMonitor
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from referencing import Registry, Resource

import jobs.pipeline
from ceca.commandline import parse_arguments
from serve.environment import ENVIRONMENT
from tests.conftest import REPOSITORY

TREE = REPOSITORY / "cluster" / "kubernetes"
DASHBOARD = REPOSITORY / "cluster" / "dashboards" / "ceca.json"
GUIDE = REPOSITORY / "docs" / "kubernetes.md"
JOBS = ("jobs/dialogue", "jobs/train", "jobs/pipeline")
APPLIED = ("base", "cluster", "service", *JOBS)  # what a user gives to `kubectl apply -k`
KUBERNETES = "1.37"
OBJECT_STORE = 0.3  # Ray's share of a pod's memory for its object store, which is in /dev/shm

Object = dict[str, Any]


# --- rendering --------------------------------------------------------------------------------------------


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
    return [found for folder in APPLIED for found in rendered(folder)]


def one(folder: str, kind: str, name: str | None = None) -> Object:
    (found,) = [
        found for found in rendered(folder) if found["kind"] == kind and name in (None, found["metadata"]["name"])
    ]
    return found


def ray_spec(owner: Object) -> Object:
    """The cluster that a RayCluster, RayJob or RayService is or has."""
    spec = owner["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def ray_specs() -> list[Object]:
    return [ray_spec(found) for found in everything() if found["apiVersion"] == "ray.io/v1"]


def group(spec: Object, name: str) -> Object:
    (found,) = [found for found in spec["workerGroupSpecs"] if found["groupName"] == name]
    return found


def nodes(spec: Object) -> list[Object]:
    """Pod templates of head and workers."""
    return [spec["headGroupSpec"]["template"], *(found["template"] for found in spec["workerGroupSpecs"])]


def ray_nodes() -> list[Object]:
    return [template for spec in ray_specs() for template in nodes(spec)]


def maps(value: Any) -> Iterator[Object]:
    """Every mapping inside of a value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from maps(inner)


def ways(value: Any, way: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """To every field of a value, however deep."""
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in named:
        yield (*way, str(name))
        yield from ways(inner, (*way, str(name)))


def pods() -> list[Object]:
    """Every pod template, wherever it is: of Ray's nodes, of the pods that submit jobs, of Redis."""
    return [found for found in maps(everything()) if "containers" in found.get("spec", {})]


def gibibytes(quantity: str) -> float:
    units = {"Mi": 1 / 1024, "Gi": 1, "Ti": 1024}
    return float(quantity[:-2]) * units[quantity[-2:]]


# --- the schemas ------------------------------------------------------------------------------------------


@functools.cache
def ray_validator(kind: str) -> jsonschema.Draft202012Validator:
    """Strict, of a kind of ray.io/v1: Ray's types are in schemas/ray.yaml, Kubernetes' in kubernetes-validate."""
    folder = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    kubernetes = json.loads(files("kubernetes_validate").joinpath(folder, "_definitions.json").read_text())
    types = yaml.safe_load((Path(__file__).parent / "schemas" / "ray.yaml").read_text())

    def schema(of: str | list[str]) -> Object:
        if isinstance(of, list):
            return {"enum": of}
        if of.endswith("[]"):
            return {"type": "array", "items": schema(of[:-2])}
        if of == "strings":
            return {"type": "object", "additionalProperties": {"type": "string"}}
        if of == "quantities":
            return {"type": "object", "additionalProperties": schema("io.k8s.apimachinery.pkg.api.resource.Quantity")}
        if of.startswith("io.k8s."):
            assert of in kubernetes["$defs"]
            return {"$ref": f"{kubernetes['$id']}#/$defs/{of}"}
        return {"$ref": f"#/$defs/{of}"} if of in types else {"type": of}

    definitions = {
        name: {
            "type": "object",
            "properties": {field.removesuffix("!"): schema(of) for field, of in fields.items()},
            "required": [field.removesuffix("!") for field in fields if field.endswith("!")],
            "additionalProperties": False,
        }
        for name, fields in types.items()
    }
    registry: Registry[Any] = Resource.from_contents(kubernetes) @ Registry()
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": definitions}, registry=registry)


def validate(found: Object) -> None:
    """Strict: a field that the schema does not know raises, as does a wrong type and one that is missing."""
    if found["apiVersion"] == "ray.io/v1":
        ray_validator(found["kind"]).validate(found)
    elif found["apiVersion"] == "monitoring.coreos.com/v1":
        read = PodMonitor.model_validate(found).model_dump(by_alias=True, exclude_unset=True, mode="json")
        unknown = set(ways(found)) - set(ways(read))  # which these models leave out
        assert not unknown, unknown
        assert read == found
    else:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)


@pytest.mark.parametrize("folder", APPLIED)
def test_what_is_applied_is_valid(folder: str) -> None:
    found = rendered(folder)
    assert found
    for each in found:
        validate(each)


def test_all_of_the_tree_is_applied_or_part_of_what_is() -> None:
    kinds: dict[str, set[str]] = {}
    for file in TREE.rglob("kustomization.yaml"):
        content = yaml.safe_load(file.read_text())
        kinds.setdefault(content["kind"], set()).add(file.parent.relative_to(TREE).as_posix())
        named = json.dumps(content)
        for other in file.parent.glob("*.yaml"):
            assert other == file or f'"{other.name}"' in named, f"{other} is in no kustomization"
    assert kinds["Kustomization"] == set(APPLIED)
    used = {
        (TREE / folder / part).resolve().relative_to(TREE).as_posix()
        for folder in APPLIED
        for part in yaml.safe_load((TREE / folder / "kustomization.yaml").read_text())["components"]
    }
    assert kinds["Component"] == used


POD = "template.spec.containers.0"
WRONG: list[tuple[str, str, str, Any]] = [
    # folder, kind, where, what: unknown fields, first in Kubernetes' own objects …
    ("base", "NetworkPolicy", "spec.ingres", []),
    ("base", "ServiceAccount", "metadata.annotation", {}),
    ("base", "PodMonitor", "spec.podMetricsEndpoints.0.intervall", "15s"),
    ("service", "StatefulSet", f"spec.{POD}.livenesProbe", {}),
    ("service", "PodDisruptionBudget", "spec.minAvailible", 1),
    # … then in Ray's, at the top and deep in pods
    ("cluster", "RayCluster", "spec.enableAutoscaling", True),
    ("cluster", "RayCluster", "spec.autoscalerOptions.idleTimeoutMinutes", 1),
    ("cluster", "RayCluster", f"spec.workerGroupSpecs.1.{POD}.securityContext.priviledged", False),
    ("cluster", "RayCluster", "spec.workerGroupSpecs.2.template.spec.tolerations.0.operater", "Exists"),
    ("service", "RayService", "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.volumes.1.emptyDir.size", "1Gi"),
    ("service", "RayService", f"spec.rayClusterConfig.headGroupSpec.{POD}.resource", {}),
    ("service", "RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword.secretKeyRef", {}),
    ("jobs/train", "RayJob", "spec.shutdownAfterJobFinished", True),
    ("jobs/train", "RayJob", "spec.submitterPodTemplate.spec.containers.0.volumeMount", []),
    # wrong types and words
    ("cluster", "RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
    ("cluster", "RayCluster", "spec.workerGroupSpecs.0.minReplicas", "0"),
    ("cluster", "RayCluster", f"spec.workerGroupSpecs.0.{POD}.ports.0.containerPort", "8080"),
    ("cluster", "RayCluster", "spec.authOptions.mode", "tokens"),
    ("jobs/train", "RayJob", "spec.submissionMode", "K8sJob"),
    ("base", "PodMonitor", "spec.podMetricsEndpoints.0.relabelings.0.action", "replaced"),
]


@pytest.mark.parametrize(
    ("folder", "kind", "where", "what"), WRONG, ids=[f"{kind}:{where}" for _, kind, where, _ in WRONG]
)
def test_a_mistake_would_be_found(folder: str, kind: str, where: str, what: Any) -> None:
    found = next(found for found in rendered(folder) if found["kind"] == kind)
    *way, last = where.split(".")
    inner: Any = found
    for step in way:
        inner = inner[int(step) if isinstance(inner, list) else step]
    inner[last] = what
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError), match=re.escape(last)):
        validate(found)


@pytest.mark.parametrize(
    ("kind", "where"), [("RayCluster", "headGroupSpec"), ("RayJob", "rayClusterSpec.headGroupSpec.template")]
)
def test_what_is_missing_would_be_found(kind: str, where: str) -> None:
    found = one("cluster" if kind == "RayCluster" else "jobs/train", kind)
    *way, last = where.split(".")
    inner = found["spec"]
    for step in way:
        inner = inner[step]
    del inner[last]
    with pytest.raises(jsonschema.ValidationError):
        validate(found)


# --- what is to be filled in ------------------------------------------------------------------------------


def test_a_site_is_filled_in_at_one_place(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "cluster", tmp_path / "cluster")
    site = tmp_path / "cluster" / "kubernetes" / "site"
    for file in site.iterdir():
        text = file.read_text().replace("s3://bucket", "s3://mine").replace("OWNER", "me").replace("ACCOUNT", "0123")
        file.write_text(text.replace("namespace: ceca", "namespace: people"))
    found = [found for folder in APPLIED for found in render(tmp_path / "cluster" / "kubernetes" / folder)]
    text = yaml.safe_dump_all(found)
    assert not re.findall(r"s3://bucket|OWNER|ACCOUNT|DATA|SOURCE", text)
    assert {each["metadata"]["namespace"] for each in found if each["kind"] != "Namespace"} == {"people"}
    data = [words[3] for each in found if each["kind"] == "RayJob" for words in [each["spec"]["entrypoint"].split()]]
    (service,) = [each["spec"]["serveConfigV2"] for each in found if each["kind"] == "RayService"]
    data.append(yaml.safe_load(service)["applications"][0]["args"]["data"])
    assert data == ["s3://mine/cuhk"] * 4


def test_the_images_are_those_of_the_dockerfile() -> None:
    built = set(re.findall(r"-t (\S+)", (REPOSITORY / "cluster" / "Dockerfile").read_text()))
    used = {container["image"] for pod in pods() for container in pod["spec"]["containers"]}
    assert used - {"redis:7.2-bookworm"} == built
    for template in ray_nodes():
        (container,) = template["spec"]["containers"]
        kind = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
        assert f":{kind}-" in container["image"]
        assert container["workingDir"] == "/opt/ceca"


def test_nothing_secret_is_in_it() -> None:
    found = everything()
    assert not [each for each in found if each["kind"] == "Secret"]
    for each in maps(found):
        if re.search("PASSWORD|TOKEN|SECRET|AUTH|AWS_", str(each.get("name", "")).upper()):
            assert "value" not in each


def secrets_named(value: Any) -> set[str]:
    names = {each["secretName"] for each in maps(value) if "secretName" in each}
    references = [each[key] for each in maps(value) for key in ("secretRef", "secretKeyRef") if key in each]
    return names | {reference["name"] for reference in references}


def test_the_guide_says_how_to_make_every_secret() -> None:
    named = secrets_named(everything())
    assert named == {"ceca-ray-token", "ceca-keys", "ceca-redis", "ceca-object-store"}
    assert named == set(re.findall(r"create secret generic (\S+)", GUIDE.read_text()))


# --- pods -------------------------------------------------------------------------------------------------


def test_the_namespace_refuses_what_is_not_restricted() -> None:
    labels = one("base", "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_pod_is_restricted() -> None:
    found = pods()
    assert len(found) > 20
    for pod in found:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(set(volume) <= {"name", "emptyDir", "secret"} for volume in pod["spec"].get("volumes", []))
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for spec in ray_specs():  # the autoscaler's container, which KubeRay adds
        assert spec["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_ray_s_pods_run_as_the_image_s_user() -> None:
    for pod in ray_nodes():
        security = pod["spec"]["securityContext"]
        assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {1000}


def test_every_container_says_what_it_needs_and_gets_no_more() -> None:
    for pod in pods():
        for container in pod["spec"]["containers"]:
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


# --- clusters ---------------------------------------------------------------------------------------------


def as_ray_reads(owner: Object) -> Object:
    """What Ray's autoscaler makes of a cluster: its kinds of nodes, by Ray's own code."""
    cluster = {"metadata": {"name": "ceca", "namespace": "ceca"}, "spec": ray_spec(owner)}
    return _derive_autoscaling_config_from_ray_cr(cluster)


def test_ray_sees_a_head_without_work_and_four_kinds_of_workers_that_cost_nothing_when_idle() -> None:
    found = as_ray_reads(one("cluster", "RayCluster"))
    kinds = found["available_node_types"]
    head = kinds.pop(found["head_node_type"])
    assert head["resources"]["CPU"] == 0
    resources = {name: (kind["resources"]["CPU"], kind["resources"].get("GPU", 0)) for name, kind in kinds.items()}
    assert resources == {"cpu": (14, 0), "dialogue": (3, 1), "train": (44, 4), "serve": (7, 1)}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in kinds.values())
    assert found["idle_timeout_minutes"] == 10


def test_clusters_are_of_the_locked_ray_scale_and_ask_for_the_token() -> None:
    (version,) = re.findall(r"^ray==(\S+)", (REPOSITORY / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    for spec in ray_specs():
        assert spec["rayVersion"] == version
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["authOptions"] == {"mode": "token", "secretName": "ceca-ray-token"}


def test_pods_with_gpus_tolerate_their_machines_taint_and_no_other_does() -> None:
    for pod in ray_nodes():
        (container,) = pod["spec"]["containers"]
        gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        assert [each["key"] for each in pod["spec"].get("tolerations", [])] == ["nvidia.com/gpu"] * gpus


def test_the_same_pods_are_in_all_clusters() -> None:
    standing = ray_spec(one("cluster", "RayCluster"))
    for folder in JOBS:
        spec = ray_spec(one(folder, "RayJob"))
        assert spec["headGroupSpec"] == standing["headGroupSpec"]
        for found in spec["workerGroupSpecs"]:
            assert found == group(standing, found["groupName"])


# --- jobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", JOBS)
def test_a_job_has_its_own_cluster_and_leaves_nothing_behind(folder: str) -> None:
    spec = one(folder, "RayJob")["spec"]
    assert "clusterSelector" not in spec
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("folder", "kinds"),
    [("jobs/dialogue", "cpu dialogue"), ("jobs/train", "cpu train"), ("jobs/pipeline", "cpu dialogue train")],
)
def test_a_job_s_cluster_has_the_workers_of_its_stages(folder: str, kinds: str) -> None:
    assert [found["groupName"] for found in ray_spec(one(folder, "RayJob"))["workerGroupSpecs"]] == kinds.split()


def command(folder: str) -> list[str]:
    """The words after `python jobs/STAGE.py`, which is there."""
    program, file, *arguments = shlex.split(one(folder, "RayJob")["spec"]["entrypoint"])
    assert program == "python"
    assert file == f"{folder}.py"
    assert (REPOSITORY / file).is_file()
    return arguments


def test_the_dialogue_s_engines_find_their_gpus() -> None:
    arguments = parse_arguments("dialogue", command("jobs/dialogue"))
    config, kind = arguments.config, as_ray_reads(one("jobs/dialogue", "RayJob"))["available_node_types"]["dialogue"]
    assert arguments.data == "s3://bucket/cuhk"
    assert config.engine == "vllm"
    assert config.vllm.gpus * config.vllm.tensor_parallel == kind["resources"]["GPU"]
    assert 1 < config.replicas <= kind["max_workers"]


def test_the_training_s_workers_fill_one_pod() -> None:
    arguments = parse_arguments("train", command("jobs/train"))
    config, kind = arguments.config, as_ray_reads(one("jobs/train", "RayJob"))["available_node_types"]["train"]
    assert config.workers * config.gpus_per_worker == kind["resources"]["GPU"]
    each = config.cpus_per_worker + config.loaders_per_worker * config.cpus_per_loader
    assert config.workers * each <= kind["resources"]["CPU"]


def test_the_pipeline_s_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(jobs.pipeline, "pipeline", lambda *values: asked.append(values))
    jobs.pipeline.main(command("jobs/pipeline"))
    assert asked == [("s3://bucket/cuhk", "s3://bucket/raw/CUHK-PEDES", "cuhk_pedes", "ceca-vitb16")]


# --- the service ------------------------------------------------------------------------------------------


def test_the_service_is_that_of_service_yaml() -> None:
    """The same settings for Ray's own command and for Kubernetes."""
    service = yaml.safe_load(one("service", "RayService")["spec"]["serveConfigV2"])
    assert service == yaml.safe_load((REPOSITORY / "serve" / "service.yaml").read_text())


def test_the_service_s_keys_are_where_it_looks_for_them() -> None:
    spec = one("service", "RayService")["spec"]
    keys = Path(yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"]["keys"])
    for pod in nodes(ray_spec({"spec": spec})):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        (mount,) = [mount for mount in pod["spec"]["containers"][0]["volumeMounts"] if mount["name"] == "keys"]
        assert (mount["mountPath"], mount["readOnly"]) == (str(keys.parent), True)
        assert volumes["keys"]["secret"]["secretName"] == "ceca-keys"
    assert f"create secret generic ceca-keys -n ceca --from-file={keys.name}" in GUIDE.read_text()


def test_users_are_sent_to_workers_that_have_loaded_everything() -> None:
    spec = one("service", "RayService")["spec"]
    assert spec["excludeHeadPodFromServeSvc"] is True
    head, *workers = nodes(ray_spec({"spec": spec}))
    assert "readinessProbe" not in head["spec"]["containers"][0], "KubeRay deploys when the head is ready"
    for worker in workers:
        (container,) = worker["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8000}
        assert {"name": "serve", "containerPort": 8000} in container["ports"]


def test_probes_of_the_service_are_in_no_other_cluster() -> None:
    """There nothing listens on port 8000, and a pod would never be ready."""
    for folder in ("cluster", *JOBS):
        spec = ray_spec(next(each for each in rendered(folder) if each["apiVersion"] == "ray.io/v1"))
        assert not [each for each in maps(spec) if "readinessProbe" in each]


def test_a_lost_machine_leaves_a_worker_that_has_room_for_a_replica_of_each_kind() -> None:
    spec = ray_spec(one("service", "RayService"))
    found = as_ray_reads(one("service", "RayService"))["available_node_types"]
    args = yaml.safe_load((REPOSITORY / "serve" / "service.yaml").read_text())["applications"][0]["args"]
    assert set(found) == {"headgroup", "cpu", "serve"}
    assert found["cpu"]["min_workers"] >= 2
    assert found["cpu"]["resources"]["CPU"] >= args["cpus"] * (args["shards"] + 1)
    most = args["cpus"] * (args["shards"] * args["search_replicas_max"] + args["encoder_replicas_max"])
    assert found["cpu"]["resources"]["CPU"] * found["cpu"]["max_workers"] >= most
    (spread,) = group(spec, "cpu")["template"]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    budget = one("service", "PodDisruptionBudget")["spec"]
    assert budget["minAvailable"] == 1
    labels = group(spec, "cpu")["template"]["metadata"]["labels"] | {"ray.io/serve": "true"}  # which KubeRay adds
    assert budget["selector"]["matchLabels"].items() <= labels.items()


def test_a_lost_head_finds_its_state_in_redis() -> None:
    options = ray_spec(one("service", "RayService"))["gcsFaultToleranceOptions"]
    service, redis = one("service", "Service"), one("service", "StatefulSet")
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    labels = redis["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert options["redisPassword"]["valueFrom"] == container["env"][0]["valueFrom"]
    assert container["args"][:2] == ["--requirepass", f"$({container['env'][0]['name']})"]
    (claim,) = redis["spec"]["volumeClaimTemplates"]
    assert container["volumeMounts"] == [{"name": claim["metadata"]["name"], "mountPath": "/data"}]
    assert {"readinessProbe", "livenessProbe"} <= set(container)
    kept = "cluster-autoscaler.kubernetes.io/safe-to-evict"
    assert kept not in yaml.safe_dump(ray_spec(one("service", "RayService"))["headGroupSpec"])
    assert kept in yaml.safe_dump(ray_spec(one("cluster", "RayCluster"))["headGroupSpec"])


# --- who may talk to whom ---------------------------------------------------------------------------------

RAY = {"app.kubernetes.io/part-of": "ceca", "app.kubernetes.io/component": "ray"}
REDIS = {**RAY, "app.kubernetes.io/component": "redis"}


def selects(selector: Object | None, labels: dict[str, str]) -> bool:
    return selector is None or selector.get("matchLabels", {}).items() <= labels.items()


def may(namespace: str, labels: dict[str, str], to: dict[str, str], port: int) -> bool:
    """Whether the policies let a pod connect to one of ours: some policy that selects that pod has a rule for it."""
    policies = [each["spec"] for each in rendered("base") if each["kind"] == "NetworkPolicy"]
    chosen = [policy for policy in policies if selects(policy["podSelector"], to)]
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)
    assert chosen, "a pod that no policy selects is open to all"

    def is_from(peer: Object) -> bool:
        name = {"kubernetes.io/metadata.name": namespace}
        there = selects(peer["namespaceSelector"], name) if "namespaceSelector" in peer else namespace == "ceca"
        return there and selects(peer.get("podSelector"), labels)

    return any(
        any(map(is_from, rule["from"])) and ("ports" not in rule or port in [each["port"] for each in rule["ports"]])
        for policy in chosen
        for rule in policy.get("ingress", [])
    )


@pytest.mark.parametrize(
    ("namespace", "labels", "to", "ports"),
    [
        ("ceca", RAY, RAY, "6379 8265 10001 8080 8000 40123"),
        ("ceca", RAY, REDIS, "6379"),
        ("ceca", {}, RAY, ""),
        ("ceca", {}, REDIS, ""),
        ("ceca", REDIS, RAY, ""),
        ("ingress-nginx", {}, RAY, "8000"),
        ("monitoring", {}, RAY, "8080"),
        ("monitoring", {}, REDIS, ""),
        ("ray-system", {"app.kubernetes.io/name": "kuberay-operator"}, RAY, "8265 8000"),
        ("ray-system", {}, RAY, ""),
        ("default", RAY, RAY, ""),  # labels alone open nothing from elsewhere
        ("default", {}, REDIS, ""),
    ],
)
def test_who_reaches_what(namespace: str, labels: dict[str, str], to: dict[str, str], ports: str) -> None:
    tried = (6379, 8265, 10001, 8080, 8000, 40123)
    assert [port for port in tried if may(namespace, labels, to, port)] == sorted(
        map(int, ports.split()), key=tried.index
    )


def test_every_pod_has_the_labels_that_the_policies_go_by() -> None:
    for pod in pods():
        labels = pod["metadata"]["labels"]
        assert RAY.items() <= labels.items() or REDIS.items() <= labels.items()


# --- what is watched --------------------------------------------------------------------------------------

# Ray's own, of every node: the rest of what the dashboard asks for is the service's.
OF_RAY = {
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_mem_used",
    "ray_object_store_memory",
    "ray_cluster_active_nodes",
    "ray_cluster_pending_nodes",
}
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def test_prometheus_finds_every_pod_of_ray() -> None:
    spec = one("base", "PodMonitor")["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    for pod in ray_nodes():
        assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert {"name": endpoint["port"], "containerPort": 8080} in pod["spec"]["containers"][0]["ports"]


def exported() -> dict[str, set[str]]:
    """Names that serve/metrics.py gives to Prometheus, by way of Ray's exporter, and their tags."""
    found = {}
    for call in ast.walk(ast.parse((REPOSITORY / "serve" / "metrics.py").read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in SUFFIXES:
            name = ast.literal_eval(call.args[0])
            tags = [set(ast.literal_eval(part)) for part in call.args if isinstance(part, ast.Tuple)]
            for suffix in SUFFIXES[call.func.id]:
                own = {"le"} if suffix == "_bucket" else set()
                found[f"ray_{name}{suffix}"] = own.union(*tags)
    return found


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    ours = exported()
    assert len(ours) == 11
    used = set()
    for query in queries():
        names = set(re.findall(r"\b(ray_\w+)\b", query)) - {"ray_io_cluster"}
        assert names
        assert names <= OF_RAY | set(ours), query
        used |= names
    assert used >= OF_RAY
    families = {name for name in ours if not name.endswith(("_bucket", "_sum", "_count"))}
    assert used >= families | {"ray_ceca_stage_seconds_bucket", "ray_ceca_batch_size_sum"}, (
        "nothing of ours is left out"
    )


def test_the_dashboard_s_queries_use_tags_that_the_metrics_have() -> None:
    ours = exported()
    for query in queries():
        selectors = re.findall(r"\b(ray_\w+)\{([^}]*)\}", query)
        assert len(selectors) == len(re.findall(r"\bray_(?!io_cluster)\w+", query)), "every metric has a selector"
        for name, conditions in selectors:
            tags = set(re.findall(r"(\w+)\s*[=!]~?\"", conditions))
            assert "ray_io_cluster" in tags, "by cluster, which monitoring.yaml writes on every metric"
            assert name in OF_RAY or tags - {"ray_io_cluster"} <= ours[name]
        grouped = {tag.strip() for tags in re.findall(r"by \(([^)]*)\)", query) for tag in tags.split(",")}
        for name, _ in selectors:
            assert name in OF_RAY or grouped <= ours[name]


def test_grafana_loads_the_dashboard() -> None:
    found = one("base", "ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    board = json.loads(found["data"]["ceca.json"])
    assert board == json.loads(DASHBOARD.read_text())
    identifiers = [panel["id"] for panel in board["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in board["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells), "no panel lies on another"
    assert max(x for x, _ in cells) < 24


# --- the guide --------------------------------------------------------------------------------------------


def test_the_guide_applies_what_there_is() -> None:
    named = set(re.findall(r"-k cluster/kubernetes/([\w/]+)", GUIDE.read_text()))
    assert named == set(APPLIED)


def test_the_guide_installs_the_operator_that_the_schema_and_the_policies_are_of() -> None:
    (version,) = re.findall(r"kuberay-operator --version (\S+)", GUIDE.read_text())
    assert f"v{version}" in (Path(__file__).parent / "schemas" / "ray.yaml").read_text()
    (namespace,) = re.findall(r"kuberay-operator --version \S+ (?:.*)--namespace (\S+)", GUIDE.read_text())
    assert may(namespace, {"app.kubernetes.io/name": "kuberay-operator"}, RAY, 8265)
