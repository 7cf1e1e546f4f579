"""cluster/kubernetes against the published schemas, in which an unknown field is an error."""

from __future__ import annotations

import contextlib
import functools
import json
import lzma
import re
from importlib.resources import files
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource

from ceca.config import ServeConfig
from ceca.settings import from_mapping
from tests.cluster.manifests import APPLIED, SCHEMAS, TREE, Object, one, ray_spec, rendered, ways
from tests.conftest import REPOSITORY

KUBERNETES = "1.37"
PUBLISHED = REPOSITORY.parent / "shared" / "kuberay" / "kuberay-v1.7.0-schemas.json.xz"
WRITTEN = {
    "ray.io/v1": "ray.yaml",
    "kueue.x-k8s.io/v1beta2": "kueue.yaml",
    "gateway.networking.k8s.io/v1": "gateway.yaml",
}


@functools.cache
def validator(file: str, kind: str) -> jsonschema.Draft202012Validator:
    """Strict validator of a kind whose fields are written down in schemas/; Kubernetes' are in kubernetes-validate."""
    folder = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    kubernetes = json.loads(files("kubernetes_validate").joinpath(folder, "_definitions.json").read_text())
    types = yaml.safe_load((SCHEMAS / file).read_text())

    def schema(of: str | list[str]) -> Object:
        if isinstance(of, list):
            return {"enum": of}
        if of.endswith("[]"):
            return {"type": "array", "items": schema(of[:-2])}
        if ">=" in of:
            name, _, least = of.partition(">=")
            return {"type": name, "minimum": int(least)}
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


def validate(manifest: Object) -> None:
    """Raise on an unknown field, a missing field or a wrong type."""
    if manifest["apiVersion"] in WRITTEN:
        validator(WRITTEN[manifest["apiVersion"]], manifest["kind"]).validate(manifest)
    elif manifest["apiVersion"] == "monitoring.coreos.com/v1":
        from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule  # slow to import

        model = {"PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}[manifest["kind"]]
        read = model.model_validate(manifest).model_dump(by_alias=True, exclude_unset=True, mode="json")
        unknown = set(ways(manifest)) - set(ways(read))  # these models ignore an unknown field
        assert not unknown, unknown
        assert read == manifest
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("folder", APPLIED)
def test_what_is_applied_is_valid(folder: str) -> None:
    manifests = rendered(folder)
    assert manifests
    for manifest in manifests:
        validate(manifest)


@functools.cache
def published(kind: str) -> jsonschema.Draft202012Validator:
    """Strict validator of a kind by KubeRay's own definitions, which are not part of this repository."""
    definitions = json.loads(lzma.decompress(PUBLISHED.read_bytes()))
    return jsonschema.Draft202012Validator(strict(definitions[f"{kind.lower()}s"]))


def strict(schema: Any) -> Any:
    """The same schema with an unknown field as an error, except where a definition takes any."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(inner) for name, inner in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"no {PUBLISHED}")
@pytest.mark.parametrize("folder", ["cluster", "service", "jobs/pipeline", "jobs/train-queued"])
def test_what_is_applied_is_valid_by_kuberay_s_own_definitions(folder: str) -> None:
    (manifest,) = [each for each in rendered(folder) if each["apiVersion"] == "ray.io/v1"]
    assert [error.message for error in published(manifest["kind"]).iter_errors(manifest)] == []
    ray_spec(manifest)["headGroupSpec"]["template"]["spec"]["containers"][0]["unknown"] = {}
    assert "unknown" in next(published(manifest["kind"]).iter_errors(manifest)).message


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
    # folder, kind, where, what. Unknown fields first, in Kubernetes' own objects …
    ("base", "NetworkPolicy", "spec.ingres", []),
    ("base", "ServiceAccount", "metadata.annotation", {}),
    ("base", "PodMonitor", "spec.podMetricsEndpoints.0.intervall", "15s"),
    ("service", "StatefulSet", f"spec.{POD}.livenesProbe", {}),
    ("service", "PodDisruptionBudget", "spec.minAvailible", 1),
    # … and in Ray's, at the top and deep inside pods.
    ("cluster", "RayCluster", "spec.enableAutoscaling", True),
    ("cluster", "RayCluster", "spec.autoscalerOptions.idleTimeoutMinutes", 1),
    ("cluster", "RayCluster", f"spec.workerGroupSpecs.1.{POD}.securityContext.priviledged", False),
    ("cluster", "RayCluster", "spec.workerGroupSpecs.2.template.spec.tolerations.0.operater", "Exists"),
    ("service", "RayService", "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.volumes.1.emptyDir.size", "1Gi"),
    ("service", "RayService", f"spec.rayClusterConfig.headGroupSpec.{POD}.resource", {}),
    ("service", "RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword.secretKeyRef", {}),
    ("jobs/train", "RayJob", "spec.shutdownAfterJobFinished", True),
    ("jobs/train", "RayJob", "spec.submitterPodTemplate.spec.containers.0.volumeMount", []),
    # Wrong types and words.
    ("cluster", "RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
    ("cluster", "RayCluster", "spec.workerGroupSpecs.0.minReplicas", "0"),
    ("cluster", "RayCluster", f"spec.workerGroupSpecs.0.{POD}.ports.0.containerPort", "8080"),
    ("cluster", "RayCluster", "spec.authOptions.mode", "tokens"),
    ("jobs/train", "RayJob", "spec.preRunningDeadlineSeconds", 0),
    ("jobs/train", "RayJob", "spec.managedBy", "me"),
    ("base", "PrometheusRule", "spec.groups.0.rules.0.expression", "up == 0"),
    ("ingress", "Ingress", "spec.rules.0.http.paths.0.pathtype", "Prefix"),
    ("ingress", "NetworkPolicy", "spec.ingress.0.from.0.ipBlock.except", "10.0.0.1/32"),
    ("gateway", "Gateway", "spec.listeners.0.tls.certificateRef", [{"name": "search-tls"}]),
    ("gateway", "HTTPRoute", "spec.rules.0.timeouts.requests", "30s"),
    ("gateway", "HTTPRoute", "spec.rules.0.backendRefs.0.port", "8000"),
    ("queue", "ClusterQueue", "spec.resourceGroups.0.flavors.0.resources.0.quota", 1),
    ("queue", "LocalQueue", "spec.queue", "ceca"),
    ("jobs/train-queued", "RayJob", "spec.queueName", "ceca"),
    ("base", "PodMonitor", "spec.podMetricsEndpoints.0.relabelings.0.action", "replaced"),
]


@pytest.mark.parametrize(
    ("folder", "kind", "where", "what"), WRONG, ids=[f"{kind}:{where}" for _, kind, where, _ in WRONG]
)
def test_a_mistake_would_be_found(folder: str, kind: str, where: str, what: Any) -> None:
    manifest = next(manifest for manifest in rendered(folder) if manifest["kind"] == kind)
    *way, last = where.split(".")
    inner: Any = manifest
    for step in way:
        inner = inner[int(step) if isinstance(inner, list) else step]
    inner[last] = what
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError), match=re.escape(last)):
        validate(manifest)


@pytest.mark.parametrize(
    ("folder", "kind", "where"),
    [
        ("cluster", "RayCluster", "headGroupSpec"),
        ("jobs/train", "RayJob", "rayClusterSpec.headGroupSpec.template"),
        ("service", "RayService", "rayClusterConfig"),
        ("queue", "LocalQueue", "clusterQueue"),
        ("gateway", "Gateway", "gatewayClassName"),
    ],
)
def test_what_is_missing_would_be_found(folder: str, kind: str, where: str) -> None:
    manifest = one(folder, kind)
    *way, last = where.split(".")
    inner = manifest["spec"]
    for step in way:
        inner = inner[step]
    del inner[last]
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest)


def unknown_to_serve(content: Object) -> set[tuple[str, ...]]:
    """Fields that Ray Serve does not read; some of its models ignore an unknown field."""
    read = ServeDeploySchema.model_validate(content).model_dump(exclude_unset=True, mode="json")
    return set(ways(content)) - set(ways(read))


def test_serve_reads_every_setting_of_the_service_and_knows_no_other() -> None:
    """`serveConfigV2` is a text, which no schema of Kubernetes looks into."""
    content = yaml.safe_load(one("service", "RayService")["spec"]["serveConfigV2"])
    assert not unknown_to_serve(content)
    (application,) = content["applications"]
    from_mapping(ServeConfig, {name: value for name, value in application["args"].items() if name != "data"}, "args")
    for wrong in (
        {**content, "http_option": {}},
        {**content, "http_options": {"host": "0.0.0.0", "prt": 8000}},
        {**content, "applications": [{**application, "routeprefix": "/"}]},
    ):
        with contextlib.suppress(ValueError):
            assert unknown_to_serve(wrong)
