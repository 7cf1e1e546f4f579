"""A Ray cluster on one machine: real Ray nodes as processes, Ray's autoscaler and a real S3 server.

    python -m cluster.local up --nodes 3 --gpus 1      a head and at most three nodes; one of them declares a GPU
    source /tmp/ceca-UID-local/env.sh                  tells ray, serve and ceca where the cluster is
    python -m cluster.local down                       ends every process of it

Use it to try what needs several nodes before you rent them; the drills use it too. Its GPUs are only declared. Work
that asks for a GPU runs on a node that declares one and computes on the CPU (CECA_DECLARED_GPUS tells the stages).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.object_store import S3Server, free_port, start_s3
from cluster.processes import MARK, MARK_FILE, end_processes, processes_of

# Size of each node's object store. All nodes share this machine's memory, so it is small.
OBJECT_STORE_BYTES = 500_000_000
# Node type and node id of the head. Ray's provider for nodes that are processes expects exactly these.
HEAD_TYPE, HEAD_ID = "ray.head.default", "f" * 51 + "00000"
# Longest wait for a cluster to start, in seconds.
STARTING_S = 120.0
# Environment of every node, so that Ray Serve works on it. It equals `serve.environment.ENVIRONMENT` (a test compares
# the two); this package imports nothing of ours, so it is written again.
SERVING = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Rule for names: `ceca.settings.NAME` (a test compares the two).
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# Most bytes of a cluster's folder. The path of a Unix socket has at most 107, and Ray adds up to 71.
FOLDER_BYTES = 36
# Where this environment's `python` and `ray` are.
PROGRAMS = Path(sys.executable).parent


class ClusterError(Exception):
    """A cluster cannot be started or ended; the message is for the user."""


@dataclass(frozen=True)
class Size:
    """Limits of a cluster: `nodes` beside the head, `gpus` of them with one GPU each, `cpus` on each node."""

    nodes: int
    gpus: int
    cpus: int
    idle_minutes: float


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Args:
        folder: holds its configuration, logs and, by default, the S3 server's objects.
        dashboard: URL of Ray's dashboard.
        variables: environment of a program that uses the cluster; they hold the keys of its S3 server.
    """

    folder: str
    dashboard: str
    variables: Mapping[str, str]

    @property
    def script(self) -> Path:
        """Shell script that exports `variables`."""
        return Path(self.folder) / "env.sh"


def folder_of(name: str) -> Path:
    """Folder of the cluster of this name, in the temporary folder, or in /tmp if the path would be too long.

    Raises:
        ClusterError: the name is not valid or too long, or somebody else has made the folder.
    """
    if not re.fullmatch(NAME, name):
        raise ClusterError(
            f"{name!r} cannot be a name: use 1 to 64 letters (a-z), digits, dots, _ and -, and begin with a letter or "
            "a digit"
        )
    places = [Path(place) / f"ceca-{os.getuid()}-{name}" for place in (tempfile.gettempdir(), "/tmp")]
    folder = next((place for place in places if len(os.fsencode(place)) <= FOLDER_BYTES), None)
    if folder is None:
        raise ClusterError(
            f"the folder {places[-1]} is longer than {FOLDER_BYTES} bytes, too long for Unix sockets: choose a shorter "
            "--name"
        )
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ClusterError(
                f"{folder} is not a folder of this user alone: it is a link, another user's, or open to others; remove "
                "it, choose another --name, or set TMPDIR"
            )
    return folder


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
    """Start a cluster. At first it is a head alone, and no stage's work runs on the head.

    Args:
        name: several clusters can run at once under different names.
        nodes: most nodes beside the head.
        gpus: number of these nodes that declare one GPU each.
        cpus: CPUs that each node declares.
        idle_minutes: a node without work is ended after this time.
        dashboard_port: port of Ray's dashboard; 0 takes a free one.
        store: folder of the S3 server; its subfolders are the buckets. None is a folder that `down` removes.
        environment: further environment variables of all nodes.

    Raises:
        ClusterError: a cluster of this name runs, the port is taken, or the cluster does not start.
    """
    if gpus > nodes:
        raise ClusterError(f"{gpus} nodes with a GPU are more than {nodes} nodes")
    folder = folder_of(name)
    if processes_of(folder):
        raise ClusterError(f"the cluster {name!r} runs already; end it with `down --name {name}`")
    dashboard_port = dashboard_port or free_port()
    _refuse_taken(dashboard_port)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ClusterError(f"cannot make {folder} ({error.strerror}); set TMPDIR to another folder") from None
    _write_private(folder / MARK_FILE, secrets.token_hex(16))
    try:
        return _start(folder, Size(nodes, gpus, cpus, idle_minutes), dashboard_port, store, environment or {})
    except BaseException:
        down(name)
        raise


def _start(
    folder: Path, size: Size, dashboard_port: int, store: Path | None, environment: Mapping[str, str]
) -> Cluster:
    """Start the S3 server, the head and Prometheus in an empty folder; the arguments are those of `up`."""
    marked = {MARK: (folder / MARK_FILE).read_text()}
    _, s3 = start_s3(store or folder / "s3", secret_key=secrets.token_hex(16), environment=marked)
    token = secrets.token_hex(32)
    _write_private(folder / "token", token)
    gcs, dashboard = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{dashboard_port}"
    variables = _client_variables(folder, gcs, dashboard, s3, declares_gpus=size.gpus > 0)
    node_variables = _node_variables(variables, {**environment, **marked})
    (folder / "autoscaling.json").write_text(json.dumps(_autoscaling(gcs, size)))
    log = folder / "start.log"
    _start_head(_head_command(folder, gcs, dashboard_port), node_variables, log)
    _wait(lambda: _answers(f"{dashboard}/api/version", token), "the dashboard does not answer", log)
    _start_prometheus(folder, node_variables)
    cluster = Cluster(str(folder), dashboard, variables)
    _write_private(folder / "cluster.json", json.dumps(asdict(cluster)))
    _write_private(
        cluster.script, "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    )
    return cluster


def _write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read; it is never readable by others, not even while it is empty."""
    file.touch(mode=0o600)
    file.write_text(text)


def _client_variables(folder: Path, gcs: str, dashboard: str, s3: S3Server, *, declares_gpus: bool) -> dict[str, str]:
    """Environment of a program that uses the cluster."""
    return {
        "RAY_ADDRESS": gcs,
        "RAY_API_SERVER_ADDRESS": dashboard,  # read by `ray job`
        "RAY_DASHBOARD_ADDRESS": dashboard,  # read by `serve`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        **s3.environment(),
        **({"CECA_DECLARED_GPUS": "1"} if declares_gpus else {}),
    }


def _node_variables(variables: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of every process of Ray.

    Args:
        variables: environment of the programs that use the cluster. The nodes have it too, except for RAY_ADDRESS, as
            nodes in a cloud have a role: whoever submits a job passes no key.
        environment: the cluster's mark, and what the caller of `up` adds.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in variables}
    shared = {name: value for name, value in variables.items() if name != "RAY_ADDRESS"}
    return {
        **inherited,
        **SERVING,
        # Ray's agents log a job's environment with its secrets unless they log warnings alone.
        "RAY_LOGGER_LEVEL": "warning",
        **shared,
        **environment,
        # `python` in a submitted command is then this environment's, as on a node whose image has only one.
        "PATH": f"{PROGRAMS}:{os.environ.get('PATH', '')}",
        "RAY_FAKE_CLUSTER": "1",  # Ray's provider for nodes that are processes refuses to start without it
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }


def _head_command(folder: Path, gcs: str, dashboard_port: int) -> list[str]:
    """Command that starts the head; it declares no CPU, so no work runs on it."""
    ports = {
        "port": gcs.rpartition(":")[2],
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
    }
    return [
        f"{PROGRAMS}/ray",
        "start",
        "--head",
        "--num-cpus=0",
        "--disable-usage-stats",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder / 'ray'}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--autoscaling-config={folder / 'autoscaling.json'}",
        *(f"--{option}={port}" for option, port in ports.items()),
    ]


def _start_head(command: list[str], environment: Mapping[str, str], log: Path) -> None:
    """Run `ray start`, which returns when the head is up; its output goes to `log`."""
    with log.open("wb") as output:
        # A file and no pipe: Ray's processes keep the output open, and reading a pipe would never end.
        started = subprocess.run(command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, check=False)
    if started.returncode:
        raise ClusterError(f"ray start failed with {started.returncode}: {log.read_text()[-2000:]}")


def _autoscaling(gcs: str, size: Size) -> dict[str, Any]:
    """Configuration of Ray's autoscaler: the fields of a file for `ray up`, with nodes that are processes."""

    def node_type(most: int, **resources: int) -> dict[str, Any]:
        declared = {"CPU": size.cpus, "object_store_memory": OBJECT_STORE_BYTES, **resources}
        return {"resources": declared, "node_config": {}, "min_workers": 0, "max_workers": most}

    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    types = {HEAD_TYPE: head, "cpu": node_type(size.nodes - size.gpus), "gpu": node_type(size.gpus, GPU=1)}
    return {
        "cluster_name": "ceca-local",
        "max_workers": size.nodes,
        "idle_timeout_minutes": size.idle_minutes,
        "upscaling_speed": 100.0,  # start all requested nodes at once: a process costs nothing
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
    """Start Prometheus if it is installed; it finds the nodes through a file that Ray keeps up to date."""
    program = shutil.which("prometheus")
    if program is None:
        return
    # The file is a link, and Prometheus does not watch the link's target. A short interval makes it read again.
    discovery = {"files": [str(folder / "ray" / "prom_metrics_service_discovery.json")], "refresh_interval": "5s"}
    config = {
        "global": {"scrape_interval": "5s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [discovery]}],
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
    """The cluster of this name, or None if it does not run."""
    folder = folder_of(name)
    if not (folder / "cluster.json").exists() or not processes_of(folder):
        return None
    return Cluster(**json.loads((folder / "cluster.json").read_text()))


def down(name: str = "local") -> int:
    """End every process of a cluster and remove its folder.

    Returns:
        The number of processes ended.

    Raises:
        ClusterError: processes are left even after SIGKILL.
    """
    folder = folder_of(name)
    ended = 0
    for _ in range(10):  # the autoscaler may start a node meanwhile
        if not (processes := processes_of(folder)):
            break
        ended += len(processes)
        end_processes(processes)
    else:
        left = ", ".join(str(process.pid) for process in processes_of(folder))
        raise ClusterError(f"the processes {left} of {folder} do not end even when killed; see `ps {left}`")
    shutil.rmtree(folder, ignore_errors=True)
    return ended


def kill_head(name: str = "local") -> None:
    """Kill the head and with it the whole cluster, as when a machine fails; the S3 server and its objects stay."""
    for process in processes_of(folder_of(name)):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray's processes end each other
            if process.name() != "rclone":
                process.kill()


def kill_node(name: str = "local") -> bool:
    """Kill the youngest node, as when a machine fails; return whether there was one beside the head."""
    raylets: list[tuple[float, psutil.Process]] = []
    for process in processes_of(folder_of(name)):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                raylets.append((process.create_time(), process))
    if len(raylets) < 2:
        return False
    _, youngest = max(raylets, key=lambda raylet: raylet[0])
    youngest.kill()  # the node's other processes end with their raylet
    return True


def _refuse_taken(port: int) -> None:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            raise ClusterError(f"port {port} is taken; choose another --dashboard-port (0 takes a free one)")


def _answers(url: str, token: str) -> bool:
    """Whether a GET with this token is answered 200."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy is told the token
    try:
        with directly.open(request, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _wait(condition: Callable[[], bool], problem: str, log: Path) -> None:
    """Wait until a condition holds; after STARTING_S raise ClusterError with the problem and the log's end."""
    deadline = time.monotonic() + STARTING_S
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{problem} after {STARTING_S:g} s: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ceca cluster", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up", help="start a cluster", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    starting.add_argument(
        "--nodes", type=int, default=3, help="most nodes beside the head; they start and end with the work"
    )
    starting.add_argument("--gpus", type=int, default=0, help="number of nodes that declare a GPU (there is none)")
    starting.add_argument("--cpus", type=int, default=4, help="CPUs that each node declares")
    starting.add_argument("--idle-minutes", type=float, default=1.0, help="a node without work ends after this time")
    starting.add_argument(
        "--dashboard-port", type=int, default=8265, help="port of Ray's dashboard; 0 takes a free one"
    )
    starting.add_argument("--store", type=Path, help="folder of the S3 server; without it, one that `down` removes")
    for command in (
        starting,
        commands.add_parser("down", help="end every process of the cluster and remove its folder"),
        commands.add_parser("status", help="nodes, work and demand as Ray's autoscaler reports them"),
    ):
        command.add_argument("--name", default="local", help="several clusters can run at once under different names")
    return parser


def _print_up(chosen: argparse.Namespace) -> None:
    print("starting a head and an S3 server ...", flush=True)
    options = ("nodes", "gpus", "cpus", "idle_minutes", "dashboard_port", "store")
    cluster = up(chosen.name, **{option: getattr(chosen, option) for option in options})
    print(f"dashboard: {cluster.dashboard}   object store: {cluster.variables['AWS_ENDPOINT_URL']}")
    prometheus = Path(cluster.folder) / "prometheus.url"
    print(f"Prometheus: {prometheus.read_text() if prometheus.exists() else 'not installed'}")
    print(f"Now, in this shell:   source {cluster.script}")


def _print_down(chosen: argparse.Namespace) -> None:
    ended = down(chosen.name)
    print(f"{ended} processes ended" if ended else f"no cluster {chosen.name!r} runs")


def _print_status(chosen: argparse.Namespace) -> None:
    cluster = find(chosen.name)
    if cluster is None:
        raise ClusterError(f"no cluster {chosen.name!r} runs; `up` starts one")
    subprocess.run([f"{PROGRAMS}/ray", "status"], env={**os.environ, **cluster.variables}, check=False)


def main(argv: list[str] | None = None) -> None:
    chosen = _parser().parse_args(argv)
    try:
        {"up": _print_up, "down": _print_down, "status": _print_status}[chosen.command](chosen)
    except (ClusterError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
