"""Units of a stage: what is published already, and lost workers, whose units others do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ceca.data.schema import CAPTIONS
from ceca.data.store import Receipt, Reject, Store
from ceca.errors import UserError
from jobs.runtime import team as module
from jobs.runtime.team import Lost, Team, WorkerLost, _Busy
from jobs.runtime.units import Output, Plan, Workers, _UnitWorker, run_plan
from tests.conftest import REPOSITORY


class Fragile:
    """A worker whose engine dies at the second unit; `work` says whether it starts at all."""

    def __init__(self, starts: bool):
        if not starts:
            raise WorkerLost("the engine cannot start")
        self.units = 0

    def __call__(self, work: Any) -> Output:
        self.units += 1
        if self.units > 1:
            raise WorkerLost("the engine was lost\nfor the third time")
        if work == "bad":
            raise UserError("no such bucket")
        return Output({}, counts={"rows": 1})


class Here(Team):
    """A team in this process."""

    def _call(self, method: str, *arguments: int) -> Any:
        return getattr(self.busy, method)(*arguments)


def unit_worker(folder: Path, team: Team, starts: bool = True) -> _UnitWorker:
    return _UnitWorker(str(folder), "dialogue", "v", Fragile, {"starts": starts}, team)


def row(unit: int, work: str = "good") -> dict[str, Any]:
    return {"unit": unit, "work": f'"{work}"'}


def result(worker: str, unit: int, lost: str = "", fatal: str = "") -> dict[str, Any]:
    return {"unit": unit, "worker": worker, "lost": lost, "fatal": fatal}


# --- published already ------------------------------------------------------------------------------------


def test_published_already_says_what_was_rejected_then_and_how_to_look_again(tmp_path, capsys):
    store = Store(str(tmp_path))
    rejects = (Reject("a.jpg", "missing_file", "no a.jpg"), Reject("b.jpg", "truncated_image", "b.jpg"))
    plan = Plan("ingest", "v1", ("captions",), [], [], Fragile, {}, {}, {})
    for whole, expected in ((rejects, "2 rejected (1 missing_file, 1 truncated_image; see"), ((), None)):
        parts = {"captions": store.write_part("captions", "v1", 0, CAPTIONS.empty_table())}
        store.publish("ingest", "v1", ("captions",), [Receipt(parts, whole)], made_from={}, config={})
        run_plan(store, plan, Workers(1, cpus=1), redo=False)
        said = " ".join(capsys.readouterr().err.split())
        assert "is published already" in said
        if expected:
            assert expected in said
            assert "--redo reads all rows again" in said
        else:
            assert "rejected" not in said


# --- lost workers -----------------------------------------------------------------------------------------


def test_a_lost_worker_keeps_its_units_until_the_others_are_idle_and_gives_them_back(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0.01)
    busy = _Busy()
    worker = unit_worker(tmp_path, Here(busy))
    first = worker(row(0))
    assert (first["lost"], first["fatal"], first["counts"]) == ("", "", '{"rows": 1}')
    assert Store(str(tmp_path)).receipts("dialogue", "v").keys() == {0}
    busy.begin(7)  # another worker
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda n=n: results.append(worker(row(n)))) for n in (1, 2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert results == []
    busy.end(7)
    for thread in threads:
        thread.join(5)
    assert {(result["unit"], result["lost"]) for result in results} == {
        (1, "the engine was lost for the third time"),
        (2, "the engine was lost for the third time"),
    }
    assert Store(str(tmp_path)).receipts("dialogue", "v").keys() == {0}
    assert busy.units() == []


def test_a_worker_that_cannot_start_gives_every_unit_back_and_an_error_of_all_is_fatal(tmp_path):
    worker = unit_worker(tmp_path, Here(_Busy()), starts=False)
    assert [worker(row(unit))["lost"] for unit in (0, 1)] == ["the engine cannot start"] * 2
    assert unit_worker(tmp_path, Here(_Busy()))(row(0, "bad"))["fatal"] == "no such bucket"


def test_units_of_a_lost_worker_are_done_in_the_next_round(capsys):
    lost = Lost("dialogue", replicas=2)
    assert not lost.gives_back(result("a", 0))
    assert lost.gives_back(result("b", 1, lost="died"))
    assert lost.gives_back(result("b", 2, lost="died"))
    assert capsys.readouterr().err.count("a worker is lost, and others do its units: died") == 1
    assert lost.take_units() == [1, 2]
    assert not lost.gives_back(result("c", 1))
    assert not lost.gives_back(result("c", 2))
    assert lost.take_units() == []


def test_the_stage_stops_when_no_worker_is_left():
    lost = Lost("dialogue", replicas=2)
    lost.gives_back(result("a", 0, lost="died"))
    with pytest.raises(UserError, match="no worker is left; the last of 2 lost ones: cannot start"):
        lost.gives_back(result("b", 1, lost="cannot start"))
    with pytest.raises(UserError, match=r"^cannot start$"):
        Lost("dialogue", replicas=1).gives_back(result("a", 0, lost="cannot start"))


def test_two_rounds_that_finish_nothing_are_the_last():
    lost = Lost("dialogue", replicas=8)  # more than the cluster has room for
    lost.gives_back(result("a", 0, lost="died"))
    assert lost.take_units() == [0]
    lost.gives_back(result("b", 0, lost="died again"))
    with pytest.raises(UserError, match="no worker is left; the last of 2 lost ones: died again"):
        lost.take_units()


def test_an_error_that_concerns_all_ends_the_stage():
    with pytest.raises(UserError, match="no such bucket"):
        Lost("dialogue", replicas=2).gives_back(result("a", 0, fatal="no such bucket"))


STAGE = """
import os, sys, time
import pyarrow as pa
from ceca.data.schema import CAPTIONS
from ceca.data.store import Store
from jobs.runtime.team import WorkerLost
from jobs.runtime.units import Output, Plan, Workers, run_plan

class Some:
    def __init__(self, folder, lost):
        marks = [f"{folder}/lost-{n}" for n in range(lost)]
        self.lost = any(self.make(mark) for mark in marks)

    def make(self, mark):
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def __call__(self, work):
        time.sleep(0.1)
        if self.lost:
            raise WorkerLost("the engine was lost for the third time")
        row = dict(caption_id=str(work), image_id="i", identity=1, split="test", text="a man")
        return Output({"captions": pa.Table.from_pylist([row], CAPTIONS)})

folder, lost = sys.argv[1], int(sys.argv[2])
plan = Plan("some", "v", ("captions",), list(range(30)), [1] * 30, Some, {"folder": folder, "lost": lost}, {}, {})
from jobs.runtime.console import entry
workers = Workers(2, cpus=1, units_at_once=2, may_be_lost=True)
entry(lambda: run_plan(Store(f"{folder}/data"), plan, workers, redo=False))
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lost", [1, 2])
def test_on_a_cluster_other_workers_do_the_units_of_a_lost_one(ray_cluster, tmp_path, lost):
    finished = subprocess.run(
        [sys.executable, "-c", STAGE, str(tmp_path), str(lost)],
        cwd=REPOSITORY,
        env={**os.environ, **ray_cluster.environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    store = Store(str(tmp_path / "data"))
    if lost == 2:
        assert finished.returncode == 2
        assert "no worker is left; the last of 2 lost ones: the engine was lost" in finished.stderr
        assert store.manifest("captions") is None
        return
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("a worker is lost, and others do its units") == 1
    ids = store.read(store.current("captions"), ["caption_id"])["caption_id"].to_pylist()
    assert ids == [str(number) for number in range(30)]
