"""What tests share: a drawn dataset, a real Ray cluster of two nodes, a real S3 server, and running commands."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
from playwright.sync_api import Browser, sync_playwright
from xdist.scheduler import LoadScopeScheduling

from cluster.object_store import S3Server, free_port, serve_s3

REPOSITORY = Path(__file__).parent.parent
# Tests that share what is slow to start, by the first of these that begins their file's name.
TOGETHER = {"tests/jobs/": "stages", "tests/cluster/": "service", "tests/serve/": "service"}
TOGETHER |= {f"tests/drills/test_{name}": name for name in ("autoscaling", "vllm")} | {"tests/drills/": "demo"}
# Few slow tests. The scheduler begins with what has most tests, and these would come last, with one process alone.
TOGETHER |= {"tests/ceca/model/test_golden": "stages", "tests/benchmarks/": "service"}
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded unless a user asks for it
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


class StartOnce(LoadScopeScheduling):
    """With `-n 2`: the stages' tests in one process and the service's in one, each with one cluster; others by file."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return next((scope for folder, scope in TOGETHER.items() if file.startswith(folder)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return StartOnce(config, log)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 images of 24 people in CUHK-PEDES's layout: 14 train, 4 val, 6 test."""
    from ceca.datasets.drawn import draw_dataset

    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder, seed=7, identities=24, images_per_identity=3, split_identities=(14, 4, 6), workers=1)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    folder = tmp_path_factory.mktemp("s3") / "served"
    (folder / "bucket").mkdir(parents=True)
    with serve_s3(folder) as server:
        yield server


@pytest.fixture(scope="session")
def s3_environment(s3: S3Server) -> Iterator[None]:
    """This process finds the S3 server as commands do: by the AWS_* variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def lone_group() -> Iterator[None]:
    """A process group of this process alone, kept to the end: DeepSpeed remembers the first one that it sees."""
    import torch.distributed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_worker(lone_group: None) -> Iterator[None]:
    """This process is the only worker, as DeepSpeed needs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("DS_ACCELERATOR", "cpu"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)
        yield


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Chromium without a window. For one test each: Playwright's loop and another's asyncio do not mix."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        missing = "no chromium or google-chrome on this machine; `make browser` installs one"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=quiet)
        yield opened
        opened.close()


class RayCluster:
    """Two Ray nodes as processes of this machine; commands join it by RAY_ADDRESS."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # A Ray that a test starts in this process changes this variable for good; these nodes stay as they are.
        self.authentication = os.environ.get("RAY_AUTH_MODE", "disabled")
        self.dashboard_port = free_port()
        # An agent at Ray's usual port would be missing, and jobs refused, where another cluster runs.
        head = {"num_cpus": 6, "include_dashboard": True, "dashboard_port": self.dashboard_port}
        self.nodes = Cluster(initialize_head=True, head_node_args={**head, "dashboard_agent_listen_port": free_port()})
        self.nodes.add_node(num_cpus=4, dashboard_agent_listen_port=free_port())

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.nodes.address, "RAY_AUTH_MODE": self.authentication}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    cluster = RayCluster()
    yield cluster
    cluster.nodes.shutdown()


def own_processes(title: str) -> list[psutil.Process]:
    """Processes of this test run whose command line holds some words; workers of its Ray clusters are among them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


Command = Callable[..., subprocess.CompletedProcess]


def finish(process: subprocess.Popen[str], within_s: float = 600, expect: int = 0) -> str:
    """All that a command says; fails with it unless the command ends in time (else it is killed) and as expected."""
    try:
        output, _ = process.communicate(timeout=within_s)
        ended = f"exited with {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        ended = f"had not ended after {within_s} s"
    assert ended == f"exited with {expect}", f"{process.args} {ended}:\n{output[-6000:]}"
    return output


@pytest.fixture(scope="session")
def start(ray_cluster: RayCluster) -> Callable[..., subprocess.Popen]:
    """Start `python jobs/<stage>.py …` on the cluster, its output in one stream."""

    def start_command(stage: str, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, f"jobs/{stage}.py", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, **ray_cluster.environment, "COLUMNS": "200", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start_command


@pytest.fixture(scope="session")
def run(start: Callable[..., subprocess.Popen]) -> Command:
    """Run a stage to its end; fails with its output unless it exits as expected."""

    def run_command(
        stage: str, *arguments: object, expect: int = 0, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        process = start(stage, *arguments, environment=environment)
        output = finish(process, 240, expect)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return run_command


@pytest.fixture
def without_ray() -> Iterator[None]:
    """As `in_this_process`."""
    from tests.stages import in_this_process

    with in_this_process():
        yield


@pytest.fixture
def do(without_ray, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Do a stage in this process, without Ray, and give back what it says, on one line."""

    def do_stage(stage: str, *arguments: object) -> str:
        importlib.import_module(f"jobs.{stage}").main([str(argument) for argument in arguments])
        return " ".join(capsys.readouterr().err.split())

    return do_stage
