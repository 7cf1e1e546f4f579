"""A cluster on one machine: real Ray nodes as processes that an autoscaler starts and ends, and a real S3 server.

    python -m cluster.local up --nodes 3 --gpus 1      a head, and up to three nodes, one of which declares a GPU
    source /tmp/ceca-UID-local/env.sh                  so that ray, serve and ceca find it
    python -m cluster.local down                       ends all of it

For trying what needs many nodes before renting them, and for drills. GPUs are declared and not there: the work of a
stage that asks for one comes to such a node and computes on its CPU (CECA_DECLARED_GPUS says so to stages).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.object_store import free_port, start_s3

MARK = "CECA_LOCAL_CLUSTER"  # in the environment of every process of a cluster: its folder
OBJECT_STORE_BYTES = 500_000_000  # of each node; they share this machine's memory
# Of the head, as Ray's provider for nodes that are processes expects it.
HEAD_TYPE, HEAD_ID = "ray.head.default", "f" * 51 + "00000"
STARTING_S, ENDING_S = 120.0, 4.0
SERVING = {  # as serve/service.yaml says of every node's environment
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class ClusterError(Exception):
    """What keeps a cluster from starting, in words for a user."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster: its folder, and what finds it.

    `variables` are what a program needs in its environment to use it; they hold the keys of its S3 server.
    """

    folder: str
    dashboard: str
    variables: Mapping[str, str]

    @property
    def script(self) -> Path:
        return Path(self.folder) / "env.sh"


def folder_of(name: str) -> Path:
    """Short, for the paths of sockets may have 107 characters."""
    return Path(tempfile.gettempdir()) / f"ceca-{os.getuid()}-{name}"


def up(
    name: str = "local",
    *,
    nodes: int = 3,
    gpus: int = 0,
    cpus: int = 4,
    idle_minutes: float = 1.0,
    dashboard_port: int = 8265,
    store: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Cluster:
    """Start a cluster: at first a head alone, on which no stage's work runs.

    Args:
        nodes: most nodes beside the head; `gpus` of them declare one GPU each. cpus: that each of them declares.
        idle_minutes: after which a node without work is ended.
        store: folder of the S3 server; its subfolders are buckets. None: one that `down` removes.
        environment: more variables for all nodes.

    Raises:
        ClusterError: there is one of this name, a port is taken, or it does not start.
    """
    if gpus > nodes:
        raise ClusterError(f"{gpus} nodes with a GPU are more than {nodes} nodes")
    folder = folder_of(name)
    if _processes(folder):
        raise ClusterError(f"the cluster {name!r} runs already; end it with `down --name {name}`")
    dashboard_port = dashboard_port or free_port()
    _refuse_taken(dashboard_port)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        return _start(folder, nodes, gpus, cpus, idle_minutes, dashboard_port, store, environment or {})
    except BaseException:
        down(name)
        raise


def _start(
    folder: Path,
    nodes: int,
    gpus: int,
    cpus: int,
    idle_minutes: float,
    dashboard_port: int,
    store: Path | None,
    environment: Mapping[str, str],
) -> Cluster:
    _, s3 = start_s3(store or folder / "s3", secret_key=secrets.token_hex(16), environment={MARK: str(folder)})
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    gcs, dashboard = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{dashboard_port}"
    variables = {
        "RAY_ADDRESS": gcs,
        "RAY_API_SERVER_ADDRESS": dashboard,  # of `ray job`
        "RAY_DASHBOARD_ADDRESS": dashboard,  # of `serve`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        **s3.environment(),
        **({"CECA_DECLARED_GPUS": "1"} if gpus else {}),
    }
    (folder / "autoscaling.json").write_text(json.dumps(_autoscaling(gcs, nodes, gpus, cpus, idle_minutes)))
    ports = {
        "port": gcs.rpartition(":")[2],
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
    }
    command = [f"{Path(sys.executable).parent}/ray", "start", "--head", "--num-cpus=0", "--disable-usage-stats"]
    command += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder / 'ray'}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [
        f"--autoscaling-config={folder / 'autoscaling.json'}",
        *(f"--{key}={port}" for key, port in ports.items()),
    ]
    # Ray's agents log a job's environment, secrets and all, where they log more than warnings.
    quiet = {"RAY_LOGGER_LEVEL": "warning"}
    # The nodes' own role, as it were: who submits a job names no key.
    own = {name: value for name, value in variables.items() if name != "RAY_ADDRESS"}
    inherited = {name: value for name, value in os.environ.items() if name not in variables}
    of_nodes = {**inherited, **SERVING, **quiet, **own, **environment, MARK: str(folder)}
    # So that `python` in a submitted command is this environment's, as on a node whose image has one.
    of_nodes |= {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    of_nodes |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    of_nodes |= {"AUTOSCALER_METRIC_PORT": str(free_port())}
    of_nodes |= {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    log = folder / "start.log"
    with log.open("wb") as output:
        # Not waited for by its pipes, which Ray's processes keep open.
        started = subprocess.run(command, env=of_nodes, stdout=output, stderr=subprocess.STDOUT, check=False)
    if started.returncode:
        raise ClusterError(f"ray start failed with {started.returncode}: {log.read_text()[-2000:]}")
    token = (folder / "token").read_text()
    _wait(lambda: _answers(f"{dashboard}/api/version", token), "the dashboard does not answer", log)
    _start_prometheus(folder, of_nodes)
    cluster = Cluster(str(folder), dashboard, variables)
    (folder / "cluster.json").touch(mode=0o600)
    (folder / "cluster.json").write_text(json.dumps(asdict(cluster)))
    cluster.script.touch(mode=0o600)
    cluster.script.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()))
    return cluster


def _autoscaling(gcs: str, nodes: int, gpus: int, cpus: int, idle_minutes: float) -> dict[str, Any]:
    """As in a file for `ray up`, with nodes that are processes."""

    def node_type(most: int, **resources: int) -> dict[str, Any]:
        declared = {"CPU": cpus, "object_store_memory": OBJECT_STORE_BYTES, **resources}
        return {"resources": declared, "node_config": {}, "min_workers": 0, "max_workers": most}

    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    types = {HEAD_TYPE: head, "cpu": node_type(nodes - gpus), "gpu": node_type(gpus, GPU=1)}
    return {
        "cluster_name": "ceca-local",
        "max_workers": nodes,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 100.0,  # all that is asked for at once: starting a process costs nothing
        "provider": {
            "type": "external",
            "module": "cluster.nodes.LocalNodes",
            "gcs_address": gcs,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            key: value for key, value in types.items() if key == HEAD_TYPE or value["max_workers"]
        },
        "head_node_type": HEAD_TYPE,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _start_prometheus(folder: Path, environment: Mapping[str, str]) -> None:
    """It finds the nodes by a file that Ray keeps; nothing where it is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        return
    # Read again often: the file is a link, and what it points to changes where Prometheus does not watch.
    found = {"files": [str(folder / "ray" / "prom_metrics_service_discovery.json")], "refresh_interval": "5s"}
    config = {
        "global": {"scrape_interval": "5s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [found]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    (folder / "prometheus.url").write_text(f"http://127.0.0.1:{port}")
    with (folder / "prometheus.log").open("wb") as log:
        subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            env=dict(environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def find(name: str = "local") -> Cluster | None:
    """The cluster of this name, if it runs."""
    folder = folder_of(name)
    if not (folder / "cluster.json").exists() or not _processes(folder):
        return None
    return Cluster(**json.loads((folder / "cluster.json").read_text()))


def down(name: str = "local") -> int:
    """End every process of a cluster and remove its folder; returns how many processes that were."""
    folder = folder_of(name)
    ended = 0
    for _ in range(10):  # an autoscaler may start a node meanwhile
        if not (processes := _processes(folder)):
            break
        ended += len(processes)
        _end(processes)
    else:
        left = ", ".join(str(process.pid) for process in _processes(folder))
        raise ClusterError(f"the processes {left} of {folder} do not end even when killed; see `ps {left}`")
    shutil.rmtree(folder, ignore_errors=True)
    return ended


def kill_head(name: str = "local") -> None:
    """Lose the head and with it the whole cluster, without a goodbye; what is in the S3 server's folder stays, and so
    does that server."""
    for process in _processes(folder_of(name)):
        with contextlib.suppress(psutil.NoSuchProcess):  # they end each other
            if process.name() != "rclone":
                process.kill()


def kill_node(name: str = "local") -> bool:
    """Lose the node that came last, without a goodbye; false where there is only the head."""
    raylets: list[tuple[float, psutil.Process]] = []
    for process in _processes(folder_of(name)):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                raylets.append((process.create_time(), process))
    if len(raylets) < 2:
        return False
    max(raylets, key=lambda found: found[0])[1].kill()  # with it all of the node ends
    return True


def _processes(folder: Path) -> list[psutil.Process]:
    """By their command, by their environment, and the children of those: Ray's workers rename themselves."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            named = any(word == str(folder) or f"{folder}/" in word for word in process.cmdline())
            if (named or process.environ().get(MARK) == str(folder)) and process.pid != os.getpid():
                for each in (process, *process.children(recursive=True)):
                    found[each.pid] = each
        except psutil.Error:
            continue  # it has ended, or is another user's
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for pid, process in found.items() if pid not in own and process.is_running()]


def _end(processes: Iterable[psutil.Process]) -> None:
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=ENDING_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=ENDING_S)


def _refuse_taken(port: int) -> None:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            raise ClusterError(f"port {port} is taken; choose another --dashboard-port (0: any that is free)")


def _answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _wait(condition: Any, problem: str, log: Path) -> None:
    deadline = time.monotonic() + STARTING_S
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{problem} after {STARTING_S:g} s: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="ceca cluster", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up", help="start one", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    starting.add_argument("--nodes", type=int, default=3, help="most nodes beside the head; they come and go with work")
    starting.add_argument("--gpus", type=int, default=0, help="of these, how many declare a GPU (there is none)")
    starting.add_argument("--cpus", type=int, default=4, help="that each node declares")
    starting.add_argument("--idle-minutes", type=float, default=1.0, help="after which a node without work is ended")
    starting.add_argument("--dashboard-port", type=int, default=8265, help="0 takes a free one")
    starting.add_argument("--store", type=Path, help="folder of the S3 server; without it, one that `down` removes")
    for command in (
        starting,
        commands.add_parser("down", help="end every process of it and remove its folder"),
        commands.add_parser("status", help="nodes, work and demand, as Ray's autoscaler sees them"),
    ):
        command.add_argument("--name", default="local", help="so that several can run at once")
    chosen = parser.parse_args(argv)
    try:
        if chosen.command == "up":
            print("starting a head and an S3 server …", flush=True)
            options = ("nodes", "gpus", "cpus", "idle_minutes", "dashboard_port", "store")
            cluster = up(chosen.name, **{option: getattr(chosen, option) for option in options})
            print(f"dashboard: {cluster.dashboard}   object store: {cluster.variables['AWS_ENDPOINT_URL']}")
            prometheus = Path(cluster.folder) / "prometheus.url"
            print(f"Prometheus: {prometheus.read_text() if prometheus.exists() else 'not installed'}")
            print(f"Now, in this shell:   source {cluster.script}")
            return
        if chosen.command == "down":
            ended = down(chosen.name)
            print(f"{ended} processes ended" if ended else f"no cluster {chosen.name!r} runs")
            return
        found = find(chosen.name)
        if found is None:
            raise ClusterError(f"no cluster {chosen.name!r} runs; `up` starts one")
        environment = {**os.environ, **found.variables}
        subprocess.run([f"{Path(sys.executable).parent}/ray", "status"], env=environment, check=False)
    except (ClusterError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
