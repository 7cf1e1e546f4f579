"""Metrics: Prometheus finds every pod of Ray; dashboard and alerts ask for metrics and tags that exist."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.serve._private import deployment_state

from tests.cluster.manifests import Object, one, ray_nodes
from tests.conftest import REPOSITORY

DASHBOARD = REPOSITORY / "cluster" / "dashboards" / "ceca.json"


# Metrics that Ray gives for every node; the dashboard's other metrics are the service's.
OF_RAY = {
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_mem_used",
    "ray_object_store_memory",
    "ray_cluster_active_nodes",
    "ray_cluster_pending_nodes",
}
# Of NVIDIA's DCGM exporter, by its default list of counters, for every GPU; its tags `gpu` and `Hostname` say which.
OF_DCGM = {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED"}
OF_SERVE = {"ray_serve_deployment_replica_healthy": {"deployment", "application"}}
OF_PODS = {"ray_io_cluster", "ray_io_group", "pod"}  # tags by the PodMonitor
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def test_prometheus_finds_every_pod_of_ray() -> None:
    spec = one("base", "PodMonitor")["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    for pod in ray_nodes():
        assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert {"name": endpoint["port"], "containerPort": 8080} in pod["spec"]["containers"][0]["ports"]


def exported() -> dict[str, set[str]]:
    """Names and tags of the metrics of serve/metrics.py, as Ray's exporter gives them to Prometheus."""
    metrics = {}
    for call in ast.walk(ast.parse((REPOSITORY / "serve" / "metrics.py").read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in SUFFIXES:
            name = ast.literal_eval(call.args[0])
            tags = [set(ast.literal_eval(part)) for part in call.args if isinstance(part, ast.Tuple)]
            for suffix in SUFFIXES[call.func.id]:
                bucket = {"le"} if suffix == "_bucket" else set()
                metrics[f"ray_{name}{suffix}"] = bucket.union(*tags)
    return metrics


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    ours = exported()
    assert len(ours) == 13
    used = set()
    for query in queries():
        names = set(re.findall(r"\b(ray_\w+|DCGM_\w+)\b", query)) - {"ray_io_cluster"}
        assert names
        assert names <= OF_RAY | OF_DCGM | set(ours), query
        used |= names
    assert used >= OF_RAY | OF_DCGM
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
        assert selectors or grouped == {"Hostname", "gpu"}, "machines of DCGM are not those of one cluster"


def test_grafana_loads_the_dashboard() -> None:
    config = one("base", "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    board = json.loads(config["data"]["ceca.json"])
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


# --- alerts ----------------------------------------------------------------------------------------------


def rules() -> list[Object]:
    specs = [one(folder, "PrometheusRule")["spec"] for folder in ("base", "service")]
    return [rule for spec in specs for group in spec["groups"] for rule in group["rules"]]


def test_alerts_ask_for_metrics_and_tags_that_there_are() -> None:
    known = {**{name: set() for name in OF_RAY}, **OF_SERVE, **exported()}
    used = set()
    for rule in rules():
        names = set(re.findall(r"\b(ray_\w+)\b(?!\s*[=!])", rule["expr"])) - OF_PODS
        assert names, rule["alert"]
        for name in names:
            assert name in known, rule["alert"]
            for conditions in re.findall(rf"\b{name}\{{([^}}]*)\}}", rule["expr"]):
                assert set(re.findall(r"(\w+)\s*[=!]~?\"", conditions)) <= set(known[name]) | OF_PODS, rule["alert"]
        used |= names
    assert used >= {"ray_ceca_requests_total", "ray_ceca_arrivals_waiting", "ray_ceca_problems_total"}
    (endpoint,) = one("base", "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert {each["targetLabel"] for each in endpoint["relabelings"]} == OF_PODS - {"pod"}


def test_ray_serve_has_the_metric_of_replicas() -> None:
    source = Path(deployment_state.__file__).read_text()
    _, _, declared = source.partition('"serve_deployment_replica_healthy"')
    assert '{"deployment": self._id.name, "application"' in declared[:1000]


HEALTHY = [
    ('ray_serve_deployment_replica_healthy{deployment="CecaIngress", application="a"}', "1x120"),
    ('ray_ceca_requests_total{status="200"}', "0+600x120"),
    ('ray_ceca_requests_total{status="503"}', "0+1x120"),
    ("ray_ceca_arrivals_waiting", "0x120"),
    ('ray_ceca_problems_total{where="following"}', "0x120"),
    ('ray_ceca_problems_total{where="intake"}', "0x120"),
    ('ray_node_gpus_utilization{ray_io_group="dialogue", ray_io_cluster="c", pod="p"}', "90x120"),
]
BROKEN: list[tuple[str, dict[int, str]]] = [  # the alert, and what is recorded instead
    ("none", {}),
    ("CecaNoReplica", {0: "0x120"}),
    ("CecaNoReplica", {0: "_x120"}),  # no pod that could say so
    ("CecaUnavailable", {2: "0+100x120"}),
    ("CecaIntakeStuck", {3: "3x120", 5: "0+1x120"}),
    ("CecaFollowingFails", {4: "0+1x120"}),
    ("CecaGpuIdle", {6: "0x120"}),
]
PROMTOOL = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_every_alert_is_tried() -> None:
    assert {rule["alert"] for rule in rules()} | {"none"} == {alert for alert, _ in BROKEN}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed; `make promtool` installs it")
@pytest.mark.parametrize(("alert", "changed"), BROKEN)
def test_an_alert_fires_on_its_trouble_and_on_no_other(alert: str, changed: dict[int, str], tmp_path: Path) -> None:
    """On a recorded hour, by Prometheus' own program."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules()}]}))
    series = [{"series": name, "values": changed.get(at, values)} for at, (name, values) in enumerate(HEALTHY)]
    tests = [
        {"eval_time": "1h", "alertname": rule["alert"], "exp_alerts": _fired(rule) if rule["alert"] == alert else []}
        for rule in rules()
    ]
    case = {"interval": "1m", "input_series": series, "alert_rule_test": tests}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [case]}))
    command = [str(PROMTOOL), "test", "rules", str(tmp_path / "test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _fired(rule: Object) -> list[Object]:
    tags = {"CecaGpuIdle": {"ray_io_cluster": "c", "pod": "p"}}
    return [
        {
            "exp_labels": {**rule["labels"], **tags.get(rule["alert"], {})},
            "exp_annotations": rule["annotations"],
        }
    ]
