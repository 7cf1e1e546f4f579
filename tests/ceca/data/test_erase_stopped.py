"""An erasure, or a stage, that is stopped for longer than its lease is silent, while the other begins and ends."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from ceca.data.changes import erased_images, hide, pending_erasures
from ceca.data.erase import erase, finish, undisturbed
from ceca.data.keys import spelled
from ceca.data.lease import Holders, LeaseError
from ceca.data.store import Receipt, Reject, Store, StoreError
from ceca.data.tables import find_images
from jobs.runtime import units
from jobs.runtime.team import Team
from jobs.runtime.units import Plan, Workers, run_plan
from tests.ceca.data.dataset import GONE, IDS, assert_erased, filled_with, only, state, write

TABLES = ("captions", "images")


class Stopped:
    """Looks at a lease; after one of the looks the process is stopped, and `meanwhile` happens."""

    def __init__(self, at: int, meanwhile: Callable[[], object]):
        self.at, self.meanwhile, self.lost, self.looks = at, meanwhile, False, itertools.count(1)

    def check(self) -> None:
        if self.lost:
            raise LeaseError("lost")
        if next(self.looks) == self.at:
            self.lost = True
            self.meanwhile()


def stage(store: Store, version: str, **more: Any) -> None:
    """Publish the dataset's tables again as they are, as `--only-missing` does with the parts that it keeps."""
    kept = [Receipt({table: part}) for table in TABLES for part in store.current(table).parts]
    made = {"arguments": {}, "made_from": {}, "config": {}, "kept": kept, **more}
    plan = Plan("ingest", version, TABLES, [], [], lambda: pytest.fail("nothing to do"), **made)
    run_plan(store, plan, Workers(1, 1), redo=False)


def assert_whole(store: Store) -> None:
    """Every table is readable, and an erased image that is still in the current tables is pending."""
    rows = state(store)  # looks at the digest of every part
    listed = set(spelled(find_images(store, store.current("images")).keys))
    assert listed.isdisjoint(erased_images(store))
    current = {row["image_id"] for table in TABLES for row in rows[f"{table}/manifest.json"]}
    assert pending_erasures(store) or current.isdisjoint(GONE)


@pytest.fixture
def some(filled: dict[str, bytes]) -> dict[str, bytes]:
    return only(filled, *(f"{table}/{of}" for table in (*TABLES, "rejects/ingest") for of in ("i2", "manifest")))


def test_an_erasure_that_was_stopped_at_any_step_harms_no_table_and_is_still_pending(some, monkeypatch):
    monkeypatch.setattr(units, "alone", lambda *_: contextlib.nullcontext(Stopped(0, list)))
    for at in itertools.count(1, 5):
        store = filled_with(some)
        name = hide(store, GONE, erase=True)
        eraser = Stopped(at, lambda store=store: stage(store, "i3"))
        try:
            finish(store, name, check=eraser.check)
        except (LeaseError, StoreError):  # else it is stopped just before it says that all is erased
            assert eraser.lost
        if not eraser.lost:
            break
        assert_whole(store)
        assert store.current("images").version == "i3"
        assert not set(spelled(find_images(store, store.current("images")).keys)) & set(GONE)
        finish(store, name)
        assert_erased(store, GONE)
        assert_whole(store)
    assert at > 15


def test_a_stage_that_was_stopped_at_any_step_publishes_no_erased_image_unless_it_is_pending(some, monkeypatch):
    for at in itertools.count(1, 2):
        store = filled_with(some)

        def erase_all(store: Store = store) -> None:
            finish(store, hide(store, GONE, erase=True))

        worker = Stopped(at, erase_all)

        monkeypatch.setattr(units, "alone", lambda *_, worker=worker: contextlib.nullcontext(worker))
        with contextlib.suppress(LeaseError, StoreError):
            stage(store, "i3")
        if not worker.lost:
            break
        assert_whole(store)
    assert at > 8


def test_what_was_erased_while_a_stage_worked_is_not_in_what_it_publishes(some):
    store = filled_with(some)
    parts = {table: write(store, table, "i3", IDS[:6], IDS[6:]) for table in TABLES}
    finish(store, hide(store, [IDS[1]], erase=True))  # by a process that took the stage for dead
    late = {table: write(store, table, "i3", IDS[:6], IDS[6:]) for table in TABLES}
    assert late == parts
    assert pending_erasures(store) == []
    kept = [Receipt({table: part}) for table in TABLES for part in late[table]]
    rejects = [Reject("1.jpg", "duplicated_record", ""), Reject(f"{IDS[1]}-1", "empty_caption", "")]
    stage(store, "i3", kept=kept, rejects=[*rejects, Reject("2.jpg", "missing_file", "")])
    ids = [row["image_id"] for row in state(store)["images/manifest.json"]]
    assert ids == [image for image in IDS if image != IDS[1]]
    assert store.read(store.current("rejects/ingest"))["key"].to_pylist() == ["2.jpg"]
    assert len(pending_erasures(store)) == 1  # its bytes are in a part that nobody names
    finish(store, *pending_erasures(store))
    assert_erased(store, [IDS[1]])


def test_an_eraser_whose_claim_was_removed_stops_before_its_next_step(some):
    store = filled_with(some)
    name = hide(store, GONE, erase=True)
    with pytest.raises(LeaseError, match="lost erase"), undisturbed(store, Holders(store), "somebody") as lease:  # noqa: PT012
        store.remove(".leases", "erase", lease.claim)
        before = state(store)
        try:
            finish(store, name, check=lease.check)
        finally:
            assert state(store) == before
    assert pending_erasures(store) == [name]


def test_a_stage_that_goes_on_without_a_dead_eraser_takes_its_claim_away(some):
    store = filled_with(some)
    dead = {"who": "x", "since": "then", "state": "holding", "beat": 1, "silent_s": 0.2, "place": "y", "process": 1}
    store.write_json(dead, ".leases", "erase", "claim.json")
    stage(store, "i3")
    assert store.names(".leases", "erase") == []


def test_receipts_without_their_parts_do_not_count(some):
    store = filled_with(some)
    parts = write(store, "images", "i3", IDS[:6], IDS[6:])
    for unit, part in enumerate(parts):
        store.write_receipt("ingest", "i3", unit, Receipt({"images": part}))
    plan = Plan("ingest", "i3", TABLES, [1, 2], [6, 6], pytest.fail, {}, {}, {})
    assert list(units._receipts(store, plan, "i3")) == [0, 1]
    store.remove("images", parts[0].path)
    assert list(units._receipts(store, plan, "i3")) == [1]


def test_a_unit_that_read_an_image_before_its_erasure_does_not_write_it(some):
    store = filled_with(some)
    hide(store, [IDS[2]], erase=True)
    from tests.ceca.data.dataset import table_of

    def made(**_: object) -> Callable[[object], units.Output]:
        return lambda _: units.Output({"images": table_of("images", IDS[:4])})

    worker = units._UnitWorker(store.uri, "ingest", "i3", made, {}, Team())
    worker({"unit": 0, "work": json.dumps(None)})
    (receipt,) = store.receipts("ingest", "i3").values()
    assert receipt.parts["images"].rows == 3
    erase(store, [IDS[2]])
