"""`python -m serve --data URI`: the search service in the foreground, until Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import ray
from ray import serve

from ceca.commandline import parse_arguments
from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.search.edition import find_edition
from serve.app import QUIET, application
from serve.environment import ENVIRONMENT

CORES = 8  # that one replica uses at most unless told: a batch has no work for more
NAME = "ceca-search"  # of the application, so that others on the same cluster are left alone


def main(argv: list[str] | None = None) -> None:
    """Check the dataset, start Ray if there is none, deploy, and stay."""
    arguments = parse_arguments("serve", argv, prog="python -m serve")
    config: ServeConfig = arguments.config
    if not (config.keys or config.open or _is_loopback(config.host)):
        raise UserError(
            f"others can reach {config.host}, and this searches for people: give --keys FILE "
            "(`python -m serve.access NAME` makes a key), or --open where something before it asks who they are"
        )
    edition = find_edition(Store(arguments.data), config.model)
    if not os.environ.get("RAY_ADDRESS"):
        _check_port(config.host, config.port)
    images = edition.manifest("gallery").rows
    print(f"starting: {images:,} images of {edition.data}, model {edition.model_name}", flush=True)
    try:
        config = _connect(config)
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


def _connect(config: ServeConfig) -> ServeConfig:
    """Join the cluster that RAY_ADDRESS names, else one that `ray start` left on this machine, else start Ray.

    Returns the settings for what was found.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet = {"logging_level": logging.WARNING, "log_to_driver": True}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    encoders = config.encoder_replicas_max or config.encoder_replicas
    searchers = config.shards * (config.search_replicas_max or config.search_replicas)
    cores = os.cpu_count() or 1
    alone = dataclasses.replace(config, cpus=config.cpus or min(cores, CORES))
    needed = (alone.cpus or 1) * (encoders + searchers)
    address = os.environ.get("RAY_ADDRESS") or _left_here()
    if address:  # it knows its CPUs
        ray.init(address=address, **quiet)
        return config
    ray.init(address="local", num_cpus=max(needed, cores), include_dashboard=False, **quiet)
    return alone


def _left_here() -> str | None:
    """The address of the cluster that `ray start` left on this machine, where it answers: of one that was killed Ray
    keeps the address, and would wait for it for minutes."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = file.read_text().strip()
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError):
        return None
    return address


def _stop() -> None:
    """Take the application down, and Serve with it unless it serves something else too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not ray.is_initialized():
        return
    # Ray prints that the Serve controller, which ends itself on request, was killed: nobody needs to read that.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.suppress(Exception):  # a cluster that is gone needs no goodbye
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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable(host: str) -> str:
    """An address to open in a browser on this machine."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def entry() -> None:
    """A UserError is one line and exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started it in the background, deaf to Ctrl-C
        signal.signal(number, _interrupt)
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    entry()
