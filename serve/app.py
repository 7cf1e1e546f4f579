"""The search service on Ray Serve: text in, people out. This module only wires the parts together.

    proxy ─► Ingress (HTTP, pictures, ranking) ─► QueryEncoder (batches)
                 │                              ─► GallerySearch 0 … n-1 (exact top-k of one shard each)
                 ├─► Intake (one): images that are added or removed ─► dialogue engine, QueryEncoder
                 └─► Judge (one, with `rerank_engine`): verdicts about the best images ─► dialogue engine

Notable: queries that arrive together are embedded in one pass and compared with the gallery in one matrix product.
Every request to a replica names its *edition* (the versions of model and gallery). A replica answers from that edition
or not at all, so no answer mixes two editions. Replicas load the next edition while they answer from the current one.
Problems of the dataset are reported before anything is deployed.

    python -m serve --data URI                         in the foreground; starts Ray if none is running
    serve deploy serve/service.yaml                    on a cluster; the same `import_path` for a KubeRay RayService
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from ceca.commandline import load_recipe
from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.machines import machines_for
from ceca.search.edition import Edition, find_edition
from ceca.search.recall import require_recall
from ceca.settings import from_mapping
from serve.access import read_keys
from serve.describer import engine_settings
from serve.encoder import QueryEncoder
from serve.ingress import Ingress
from serve.intake import Intake
from serve.judge import Judge
from serve.searcher import GallerySearch
from serve.tokens import read_issuer
from serve.wire import INGRESS

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
CALLS = 4  # calls in progress at one replica, each with up to a batch of queries; with more, another replica starts
DRAIN_S = 10  # time that a replica has to finish its requests before it is stopped
# Share of a CPU that ingress and intake take, which mostly wait. With none, Ray could place them on a head without
# CPUs, and they would be lost with it.
WAITING = 0.1


def build(arguments: dict[str, Any]) -> Application:
    """Make the application from plain values: serve/service.yaml, `serve run serve.app:build key=value …`, KubeRay.

    Args:
        arguments: `data` (dataset URI), optionally `recipe`, and settings of ServeConfig except host and port. Those
            two belong to Ray Serve's own `http_options`.

    Raises:
        UserError: an argument is not valid, or the dataset has nothing to serve.
    """
    values = dict(arguments)
    data, recipe = values.pop("data", ""), values.pop("recipe", "")
    if not data:
        raise UserError("serve.app:build needs data=URI, the dataset whose gallery is served")
    for name in ("host", "port"):
        if name in values:
            raise UserError(f"serve.app:build takes no {name!r}: set it in Ray Serve's http_options")
    section = (load_recipe(recipe).get("serve") or {}) if recipe else {}
    config = from_mapping(ServeConfig, {**section, **values}, "serve.app:build")
    if not (config.keys or config.oidc or config.open):
        raise UserError(
            "serve.app:build needs keys=FILE (see serve/access.py) or oidc=FILE (serve/tokens.py), or open=true if "
            "nobody else can reach the service"
        )
    return application(find_edition(Store(data), config.model), config)


def application(edition: Edition, config: ServeConfig) -> Application:
    """Bind the deployments of a service together.

    Args:
        edition: what the dataset has to search now; it was read, so it is in order. Its dataset is served.
        config: settings of the service.

    Raises:
        UserError: approximate search finds less than the settings ask for.
    """
    require_recall(edition.store, edition, config.approximate, config.least_recall)
    keys = read_keys(Path(config.keys).expanduser()) if config.keys else ()
    issuer = read_issuer(Path(config.oidc).expanduser()) if config.oidc else None
    data = edition.data
    common = {
        "logging_config": QUIET,
        "graceful_shutdown_timeout_s": DRAIN_S,
        "graceful_shutdown_wait_loop_s": 1.0,
    }
    computing = {
        "ray_actor_options": {
            "num_cpus": config.cpus or 1,
            "num_gpus": config.gpus,
            "label_selector": replica_machines(config.gpus),
        },
        # At least one call per request, so that no replica is idle while requests wait.
        "max_ongoing_requests": 4 * config.batch,
        "max_queued_requests": config.queue,
        **common,
    }
    encoder = serve.deployment(**_replicas(config, "encoder", CALLS), **computing)(QueryEncoder).bind(data, config)
    shards = [
        serve.deployment(name=f"GallerySearch{number}", **_replicas(config, "search", CALLS), **computing)(
            GallerySearch
        ).bind(data, config, number)
        for number in range(config.shards)
    ]
    waiting = {"num_cpus": WAITING, "label_selector": machines_for("cpu", "serve")}
    intake = serve.deployment(ray_actor_options=waiting, **common)(Intake).bind(
        data, config, engine_settings(edition, config), encoder
    )
    judge = None
    if config.rerank_engine is not None:
        # Searches that wait for verdicts are limited by the ingress, and by their own seconds.
        calls = {"max_ongoing_requests": config.queue * config.most("ingress")}
        judge = serve.deployment(ray_actor_options=waiting, **calls, **common)(Judge).bind(data, config)
    ingress = serve.deployment(
        name=INGRESS,
        **_replicas(config, "ingress", config.queue / 2),
        ray_actor_options=waiting,
        max_ongoing_requests=2 * config.queue,  # it refuses requests above `queue` itself, with words
        max_queued_requests=config.queue,
        backpressure_config=BackpressureConfig(retry_after_s=1),
        **common,
    )
    return ingress(serve.ingress()(Ingress)).bind(
        data, config, keys, encoder, shards, intake, secrets.token_bytes(32), issuer, judge
    )


def replica_machines(gpus: float) -> dict[str, str]:
    """Ray's label selector of the replicas that compute, which have this number of GPUs each."""
    return machines_for("serve" if gpus else "cpu")


def _replicas(config: ServeConfig, kind: str, target: float) -> dict[str, Any]:
    """The number of replicas of a deployment, fixed or following the load, and how many of them a node may have.

    Args:
        config: settings of the service.
        kind: `encoder`, `search` or `ingress`.
        target: requests in progress or waiting per replica that autoscaling aims at.
    """
    least, most = getattr(config, f"{kind}_replicas"), getattr(config, f"{kind}_replicas_max")
    apart = {"max_replicas_per_node": config.replicas_per_node}
    if most is None:
        return {"num_replicas": least, **apart}
    return {
        **apart,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=target,
            upscale_delay_s=5,
            downscale_delay_s=config.shrink_s,
        ),
    }
