"""Network policies of cluster/kubernetes: which pod reaches which port."""

from __future__ import annotations

import ipaddress
import re

import pytest

from ceca.config import ServeConfig
from tests.cluster.manifests import GUIDE, SCHEMAS, Object, one, pods, rendered

RAY = {"app.kubernetes.io/part-of": "ceca", "app.kubernetes.io/component": "ray"}
REDIS = {**RAY, "app.kubernetes.io/component": "redis"}


def selects(selector: Object | None, labels: dict[str, str]) -> bool:
    return selector is None or selector.get("matchLabels", {}).items() <= labels.items()


def may(namespace: str, labels: dict[str, str], to: dict[str, str], port: int) -> bool:
    """Whether the policies let a pod connect to one of ours.

    They do if a policy that selects our pod has a rule for the other one.

    Args:
        namespace: of the pod that connects.
        labels: of the pod that connects.
        to: labels of our pod.
        port: of our pod.
    """
    policies = [each["spec"] for each in rendered("base") if each["kind"] == "NetworkPolicy"]
    chosen = [each for each in policies if "Ingress" in each["policyTypes"] and selects(each["podSelector"], to)]
    assert chosen, "a pod without a policy is open to everyone"

    def is_from(peer: Object) -> bool:
        name = {"kubernetes.io/metadata.name": namespace}
        allowed = selects(peer["namespaceSelector"], name) if "namespaceSelector" in peer else namespace == "ceca"
        return allowed and selects(peer.get("podSelector"), labels)

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


def test_the_guide_installs_the_operator_that_the_schema_and_the_policies_are_of() -> None:
    (version,) = re.findall(r"kuberay-operator --version (\S+)", GUIDE.read_text())
    assert f"v{version}" in (SCHEMAS / "ray.yaml").read_text()
    (namespace,) = re.findall(r"kuberay-operator --version \S+ (?:.*)--namespace (\S+)", GUIDE.read_text())
    assert may(namespace, {"app.kubernetes.io/name": "kuberay-operator"}, RAY, 8265)


def may_leave(labels: dict[str, str], address: str) -> bool:
    """Whether the policies let a pod of ours connect to an address outside the cluster.

    Args:
        labels: of the pod.
        address: where it connects to.
    """
    policies = [each["spec"] for each in rendered("base") if each["kind"] == "NetworkPolicy"]
    chosen = [each for each in policies if "Egress" in each["policyTypes"] and selects(each["podSelector"], labels)]
    assert chosen, "a pod without a policy reaches everything"
    blocks = [
        peer["ipBlock"] for policy in chosen for rule in policy["egress"] for peer in rule["to"] if "ipBlock" in peer
    ]
    reached = ipaddress.ip_address(address)

    def holds(block: Object) -> bool:
        without = any(reached in ipaddress.ip_network(each) for each in block.get("except", []))
        return reached in ipaddress.ip_network(block["cidr"]) and not without

    return any(map(holds, blocks))


@pytest.mark.parametrize(
    ("labels", "address", "reached"),
    [
        (RAY, "169.254.169.254", False),  # the role of the machine
        (RAY, "fd00:ec2::254", False),
        (RAY, "169.254.170.23", True),  # EKS Pod Identity: the role of the pod
        (RAY, "52.216.0.1", True),
        (RAY, "2001:db8::1", True),
        (REDIS, "52.216.0.1", False),
        (REDIS, "169.254.169.254", False),
    ],
)
def test_the_metadata_service_is_closed_and_object_stores_are_open(
    labels: dict[str, str], address: str, reached: bool
) -> None:
    assert may_leave(labels, address) == reached


@pytest.mark.parametrize("way", ["ingress", "gateway"])
def test_a_load_balancer_reaches_the_service_s_port_and_no_other(way: str) -> None:
    policy = one(way, "NetworkPolicy")["spec"]
    (rule,) = policy["ingress"]
    assert rule == {"from": [{"ipBlock": {"cidr": "10.0.0.0/16"}}], "ports": [{"protocol": "TCP", "port": 8000}]}
    assert selects(policy["podSelector"], RAY)


SERVED = "search-serve-svc"  # what KubeRay calls the Service of the RayService `search`


def test_the_ingress_ends_tls_before_the_service() -> None:
    assert one("service", "RayService")["metadata"]["name"] == SERVED.removesuffix("-serve-svc")
    ingress = one("ingress", "Ingress")["spec"]
    (tls,), (host,) = ingress["tls"], ingress["rules"]
    assert tls["hosts"] == [host["host"]]
    (path,) = host["http"]["paths"]
    assert path["backend"]["service"] == {"name": SERVED, "port": {"number": 8000}}


def test_the_gateway_ends_tls_before_the_service_and_sends_others_to_it() -> None:
    gateway = one("gateway", "Gateway")
    ports = {each["name"]: (each["protocol"], each["port"]) for each in gateway["spec"]["listeners"]}
    assert ports == {"https": ("HTTPS", 443), "http": ("HTTP", 80)}
    host = one("ingress", "Ingress")["spec"]["rules"][0]["host"]
    (secret,) = one("ingress", "Ingress")["spec"]["tls"]
    for listener in gateway["spec"]["listeners"]:
        assert listener["hostname"] == host
        names = [each["name"] for each in listener.get("tls", {}).get("certificateRefs", [])]
        assert names == ([secret["secretName"]] if listener["protocol"] == "HTTPS" else [])
    routes = {}
    for name in ("search", "search-redirect"):
        spec = one("gateway", "HTTPRoute", name)["spec"]
        (parent,), (rule,) = spec["parentRefs"], spec["rules"]
        assert parent["name"] == gateway["metadata"]["name"]
        assert spec["hostnames"] == [host]
        routes[parent["sectionName"]] = rule
    assert routes["https"]["backendRefs"] == [{"name": SERVED, "port": 8000}]
    assert float(routes["https"]["timeouts"]["request"].removesuffix("s")) > ServeConfig().timeout_s
    (filtered,) = routes["http"]["filters"]
    assert filtered["requestRedirect"]["scheme"] == "https"
    assert "backendRefs" not in routes["http"], "nothing is answered without TLS"
