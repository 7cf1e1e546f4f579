"""Workers whose GPUs are on several machines: settings, and what Ray reserves for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ceca.config import DialogueConfig, VLLMConfig
from ceca.data.store import Store
from jobs.dialogues.engine import engine_workers
from jobs.runtime.spread import bundles_of
from tests.conftest import REPOSITORY


def test_an_engine_is_on_one_machine_unless_it_is_said() -> None:
    def spread(**settings: object) -> bool:
        made = DialogueConfig(vllm=VLLMConfig(tensor_parallel=2, **settings))  # type: ignore[arg-type]
        return engine_workers(made, made.images_per_part).spread

    assert not spread()
    assert spread(several_machines=True)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tensor_parallel": 1}, "two GPUs or more"),
        ({"tensor_parallel": 2, "gpus": 0}, "two GPUs or more"),
        ({"tensor_parallel": 2, "model": "s3://bucket/model"}, "a folder that all machines share"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        VLLMConfig(several_machines=True, **settings)  # type: ignore[arg-type]


def test_a_bundle_has_one_gpu_and_room_for_the_worker() -> None:
    assert bundles_of(2, 1, None) == [{"GPU": 1.0, "CPU": 1}] * 2
    assert bundles_of(1, 2, "H100") == [{"GPU": 1.0, "CPU": 2, "accelerator_type:H100": 0.001}]


# Two nodes with a GPU each, and three rounds of one stage: each finds the GPUs of the round before free again. In the
# last one a second worker waits for GPUs that the first has.
STAGE = """
import sys
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster
from ceca.data.schema import CAPTIONS
from ceca.data.store import Store
from cluster.object_store import free_port
from ray.util.placement_group import placement_group_table
from jobs.runtime.units import Output, Plan, Workers, run_plan

class Places:
    def __call__(self, work):
        group = ray.util.get_current_placement_group()
        nodes = placement_group_table(group)["bundles_to_node_id"]
        text = f"{len(nodes)} bundles on {len(set(nodes.values()))} nodes, {len(ray.get_gpu_ids())} GPUs here"
        row = dict(caption_id=str(work), image_id="i", identity=1, split="test", text=text)
        return Output({"captions": pa.Table.from_pylist([row], CAPTIONS)})

head = {"num_cpus": 0, "include_dashboard": False, "dashboard_port": free_port()}
nodes = Cluster(initialize_head=True, head_node_args={**head, "dashboard_agent_listen_port": free_port()})
for _ in range(2):
    ports = {"dashboard_agent_listen_port": free_port()}
    nodes.add_node(num_cpus=2, num_gpus=1, labels={"ceca-pool": "dialogue"}, **ports)
ray.init(nodes.address, logging_level="error", log_to_driver=False)
for version, workers in [("a", 1), ("b", 1), ("c", 2)]:
    plan = Plan("some", version, ("captions",), [1, 2], [1, 1], Places, {}, {}, {})
    run_plan(Store(sys.argv[1]), plan, Workers(workers, cpus=1, gpus=2, spread=True), redo=False)
print(len(placement_group_table()), "reservations")
ray.shutdown()  # before its nodes go: a driver that loses them exits with 1
nodes.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_reserves_gpus_of_two_machines_and_gives_them_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAGE, str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == "4 reservations\n"  # one for each worker: one without a worker could keep its GPUs from it
    store = Store(str(tmp_path))
    texts = store.read(store.current("captions"), ["text"])["text"].to_pylist()
    assert texts == ["2 bundles on 2 nodes, 0 GPUs here"] * 2
