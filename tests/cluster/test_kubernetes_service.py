"""The service of cluster/kubernetes: its settings, its probes, and what survives a lost machine."""

from __future__ import annotations

from pathlib import Path

import yaml

from serve.audit import FILE_LIMIT, FILES
from tests.cluster.manifests import GUIDE, JOBS, as_ray_reads, gibibytes, group, maps, nodes, one, ray_spec, rendered
from tests.conftest import REPOSITORY


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
    types = as_ray_reads(one("service", "RayService"))["available_node_types"]
    args = yaml.safe_load((REPOSITORY / "serve" / "service.yaml").read_text())["applications"][0]["args"]
    assert set(types) == {"headgroup", "cpu", "serve"}
    assert types["cpu"]["min_workers"] >= 2
    assert types["cpu"]["resources"]["CPU"] >= args["cpus"] * (args["shards"] + 1)
    most = args["cpus"] * (args["shards"] * args["search_replicas_max"] + args["encoder_replicas_max"])
    assert types["cpu"]["resources"]["CPU"] * types["cpu"]["max_workers"] >= most
    spread = [each["topologyKey"] for each in group(spec, "cpu")["template"]["spec"]["topologySpreadConstraints"]]
    assert spread == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert args["replicas_per_node"] == 1
    kinds = [args[f"{kind}_replicas_max"] for kind in ("search", "encoder")] + [args["ingress_replicas"]]
    assert types["cpu"]["min_workers"] >= args["ingress_replicas"], "each kind has two replicas from the start"
    assert types["cpu"]["max_workers"] >= max(kinds), "a node has one replica of a kind"
    assert types["serve"]["max_workers"] >= max(kinds)
    budget = one("service", "PodDisruptionBudget")["spec"]
    assert budget["minAvailable"] == 1
    labels = group(spec, "cpu")["template"]["metadata"]["labels"] | {"ray.io/serve": "true"}  # KubeRay adds this one
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


def test_the_log_of_requests_leaves_each_pod_that_serves() -> None:
    """A container beside the worker reads the folder that the service writes by default."""
    for workers in ray_spec(one("service", "RayService"))["workerGroupSpecs"]:
        pod = workers["template"]["spec"]
        (collector,) = pod["initContainers"]
        assert collector["restartPolicy"] == "Always", "else the worker waits for its end"
        assert collector["command"] == ["python", "-m", "serve.audit"]
        (shared,) = collector["volumeMounts"]
        assert shared in pod["containers"][0]["volumeMounts"]
        assert shared["mountPath"] == "/home/ray/.local/state"
        (volume,) = [each for each in pod["volumes"] if each["name"] == shared["name"]]
        kept = (FILES + 1) * FILE_LIMIT
        assert gibibytes(volume["emptyDir"]["sizeLimit"]) * 2**30 > 2 * kept
    args = yaml.safe_load(one("service", "RayService")["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert "audit" not in args
