"""`python -m serve --data URI`: the search service in the foreground, until Ctrl-C.

Ray and torch are imported inside functions, so that --help and wrong options are answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import socket
import sys
import time

from ceca.commandline import parse_arguments
from ceca.config import ServeConfig
from ceca.config.evaluate import REPLICATED
from ceca.environment import cannot_join, hand_token_to_ray, ray_address, ray_folder, started_here
from ceca.errors import UserError
from serve.audit import audit_folder
from serve.environment import ENVIRONMENT
from serve.origin import is_loopback

CORES = 8  # most CPUs per replica unless the settings say otherwise: a batch has no work for more
NAME = "ceca-search"  # of the application, so that other applications on the same cluster are left alone


def main(argv: list[str] | None = None) -> None:
    """Check the dataset, start Ray if it is not running, deploy the service, and wait for Ctrl-C.

    Raises:
        UserError: the options are not safe or the port is taken, or the dataset has nothing to serve.
    """
    arguments = parse_arguments("serve", argv, prog="python -m serve")
    config: ServeConfig = arguments.config
    if not (config.keys or config.oidc or config.open or is_loopback(config.host)):
        raise UserError(
            f"others can reach {config.host}, and this searches for people: give --keys FILE "
            "(`python -m serve.access NAME` makes a key), or --open if a proxy in front of it authenticates users"
        )
    named = ray_address()
    from ceca.data.store import Store
    from ceca.search.edition import find_edition

    edition = find_edition(Store(arguments.data), config.model)
    if not named:
        _check_port(config.host, config.port)
        if config.keys or config.oidc:
            audit_folder(config.audit)
    import ray
    from ray import serve

    from serve.app import QUIET, application
    from serve.describer import engine_settings

    images = edition.manifest("gallery").rows
    print(f"starting: {images:,} images of {edition.data}, model {edition.model_name}", flush=True)
    if isinstance(engine := engine_settings(edition, config), str):
        print(f"images that are added need a summary: {engine}", file=sys.stderr)
    try:
        config = _connect(config, named or started_here())
        serve.start(http_options={"host": config.host, "port": config.port}, logging_config=QUIET)
        serve.run(application(edition, config), name=NAME, route_prefix="/", logging_config=QUIET)
        print(f"http://{_reachable(config.host)}:{config.port}", flush=True)
        node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
        print(f"for Prometheus: http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        _stop()


def _connect(config: ServeConfig, address: str) -> ServeConfig:
    """Join a cluster, or start Ray.

    Args:
        config: settings of the service.
        address: of the cluster; empty starts Ray.

    Returns:
        The settings, with the CPUs per replica if Ray was started here.

    Raises:
        UserError: there is no such cluster, or one node is too few.
    """
    import ray

    from serve.app import WAITING

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet = {"logging_level": logging.WARNING, "log_to_driver": True}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address:  # the cluster has its own number of CPUs
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            raise cannot_join(address, error) from error
        return config
    _check_replicas(config)
    cores = os.cpu_count() or 1
    cpus = config.cpus or min(cores, CORES)
    waiting = math.ceil(WAITING * (1 + (config.rerank_engine is not None) + config.most("ingress")))
    cores = max(cpus * (config.most("encoder") + config.shards * config.most("search")) + waiting, cores)
    hand_token_to_ray()
    ray.init(address="local", num_cpus=cores, include_dashboard=False, _temp_dir=ray_folder(), **quiet)
    return dataclasses.replace(config, cpus=cpus)


def _check_replicas(config: ServeConfig) -> None:
    """Check that all replicas find room on a single node: Ray would wait in silence for another one.

    Raises:
        UserError: the settings allow fewer replicas of a kind on a node.
    """
    for kind in REPLICATED:
        replicas = config.most(kind)
        if config.replicas_per_node is not None and replicas > config.replicas_per_node:
            raise UserError(
                f"{replicas} {kind} replicas with --replicas-per-node {config.replicas_per_node} need a cluster of "
                f"{math.ceil(replicas / config.replicas_per_node)} nodes, and this machine is one: name a cluster by "
                "RAY_ADDRESS, or leave --replicas-per-node out"
            )


def _stop() -> None:
    """Delete the application, and stop Ray Serve unless it serves other applications too."""
    import ray
    from ray import serve

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not ray.is_initialized():
        return
    # The Serve controller ends itself on request, but Ray prints that it was killed. Do not show that.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.suppress(Exception):  # the cluster may be gone already
            serve.delete(NAME)
            if not serve.status().applications:
                serve.shutdown()
        ray.shutdown()


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from None


def _reachable(host: str) -> str:
    """The host to open in a browser on this machine."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def entry() -> None:
    """Run the command. A UserError is printed in one line, with exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background process would ignore Ctrl-C otherwise
        signal.signal(number, _interrupt)
    try:
        main()
    except Exception as error:
        from ceca.data.filesystems import comes_from_s3, explain_s3

        if not isinstance(error, UserError) and not comes_from_s3(error):
            raise
        words = str(error) if isinstance(error, UserError) else explain_s3(error)
        print(f"error: {' '.join(words.split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    entry()
