"""The machine of the head is lost while clients ask: every question is answered, and a new head takes over.

As on Kubernetes, the clients reach the workers alone, and the head keeps its state where a new one finds it: there in
Redis, here on a disk (Ray's other store, RocksDB).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ceca.data.store import Store
from ceca.search.searcher import Searcher
from serve.environment import ENVIRONMENT
from tests.conftest import REPOSITORY
from tests.serve.conftest import COUNT, wait_until_ready
from tests.serve.dataset import QUERY, publish_gallery, publish_people, publish_tiny
from tests.serve.machines import Machine, Network, network
from tests.serve.test_chaos import Clients

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

PORT, LOST_S = 8000, 20
RECONNECT_S = 600  # KubeRay tells workers to wait so long for a new head; Ray's own default is a minute

DEPLOY = """
import sys
import ray
from ray import serve
from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.search.edition import find_edition
from serve.app import QUIET, application
head, here, data, port = sys.argv[1:]
ray.init(head, _node_ip_address=here, log_to_driver=False)
serve.start(http_options={"host": "0.0.0.0", "port": int(port)}, logging_config=QUIET)
config = ServeConfig(ingress_replicas=2, encoder_replicas=2, search_replicas=2, replicas_per_node=1, open=True)
serve.run(application(find_edition(Store(data)), config), logging_config=QUIET)
"""


class Cluster:
    """A head without CPUs and two workers, each on a machine of its own."""

    def __init__(self, made: Network, state: Path):
        names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "http_proxy", "HTTP_PROXY")
        self.environment = {name: value for name, value in os.environ.items() if name not in names}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S)}
        self.environment |= ENVIRONMENT
        self.state = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(state)}
        self.network = made
        self.start_head()
        self.workers = [made.add(number) for number in (3, 4)]
        for worker in self.workers:
            self._start_ray(worker, f"--address={self.head.address}:6379", "--num-cpus=4")
        for worker in self.workers:
            self._wait_for_ray(worker)

    def start_head(self) -> None:
        self.head = self.network.add(2)
        self._start_ray(self.head, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        self._wait_for_ray(self.head)

    def _start_ray(self, machine: Machine, *options: str) -> None:
        common = ["--block", "--disable-usage-stats", f"--object-store-memory={150 * 2**20}"]
        places = [f"--node-ip-address={machine.address}", f"--temp-dir={machine.folder}"]
        program = Path(sys.executable).parent / "ray"
        machine.start([program, "start", *options, *common, *places], self.environment | self.state)

    def _wait_for_ray(self, machine: Machine) -> None:
        def started() -> bool:
            assert all(process.poll() is None for process in machine.processes), machine.log()
            return "Ray runtime started" in machine.log()

        until(started, 240, machine.log)

    def deploy(self, store: Store) -> None:
        worker = self.workers[0]
        arguments = [f"{self.head.address}:6379", worker.address, store.uri, PORT]
        command = [sys.executable, "-c", DEPLOY, *map(str, arguments)]
        process = worker.start(command, self.environment | {"PYTHONPATH": str(REPOSITORY)})
        assert process.wait(300) == 0, worker.log()

    def replicas(self, kind: str) -> set[int]:
        """Processes of the replicas of a kind."""
        return {pid for worker in self.workers for pid, line in worker.running().items() if f":{kind}" in line}


def until(condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with network() as made:
        yield Cluster(made, tmp_path / "state")


def test_every_question_is_answered_while_the_head_is_lost_and_when_a_new_one_comes(
    cluster: Cluster, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "data"))
    publish_people(store, COUNT)
    model, published = publish_tiny(store, "tiny", seed=1)
    publish_gallery(store, model, published, "tiny")
    expected = [hit.similarity for hit in Searcher(store).search(QUERY, omega=0.3, top_k=30)]
    cluster.deploy(store)
    urls = [f"http://{worker.address}:{PORT}" for worker in cluster.workers]
    for url in urls:
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_until_ready(client)
    clients = [Clients(f"{url}/v1/search", count=4) for url in urls]

    def asked(more: int) -> None:
        """Both workers answer this many more questions."""
        before = [len(each.answers) for each in clients]
        until(lambda: all(len(each.answers) >= was + more for each, was in zip(clients, before, strict=True)), 60)

    try:
        asked(20)
        replicas = cluster.replicas("QueryEncoder")
        assert len(replicas) == 2
        cluster.network.lose(cluster.head)
        lost = time.monotonic()
        while time.monotonic() < lost + LOST_S:
            asked(20)
        assert cluster.replicas("QueryEncoder") == replicas

        cluster.start_head()
        asked(20)
        assert cluster.replicas("QueryEncoder") == replicas, "the new head takes them over"
        killed = min(replicas)
        os.kill(killed, 9)
        until(lambda: len(cluster.replicas("QueryEncoder") - {killed}) == 2, 90, cluster.head.log)
        assert cluster.replicas("QueryEncoder") > replicas - {killed}
        asked(20)
    finally:
        for each in clients:
            each.stop()
    for each in clients:
        assert not each.errors
        print(f"{len(each.answers)} questions answered")
        assert {answer.status_code for answer in each.answers} == {200}
        for answer in each.answers:
            assert [hit["similarity"] for hit in answer.json()["hits"]] == pytest.approx(expected, abs=1e-5)
