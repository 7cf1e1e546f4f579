"""Metrics: Prometheus finds every pod of Ray, and the dashboard asks for metrics and tags that exist."""

from __future__ import annotations

import ast
import json
import re

from tests.cluster.manifests import one, ray_nodes
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
