"""`ceca remove`: which images it takes, what it says, and how it waits for stages."""

from __future__ import annotations

import threading

import pytest

from ceca.data import schema
from ceca.data.changes import added_images, mentioned_images, pending_erasures, write_added
from ceca.data.erase import undisturbed
from ceca.data.lease import Holders, holding
from ceca.errors import UserError
from jobs.remove import remove
from jobs.runtime.alone import alone
from tests.ceca.data.dataset import IDS, assert_erased, filled_with, state, table_of, without


def test_the_command_erases_and_finishes_what_was_interrupted(filled, capsys, monkeypatch):
    store = filled_with(filled)
    before = state(store)
    assert remove(store.uri, images=(IDS[7],)) == {IDS[7]}
    assert state(store) == before
    assert remove(store.uri, identities=(2,), erase=True) == {IDS[4], IDS[5]}
    assert state(store) == without(before, {IDS[4], IDS[5]})
    said = " ".join(capsys.readouterr().err.split())
    assert "4 of images" in said
    assert "models trained with the images" in said

    with monkeypatch.context() as killed:
        killed.setattr("jobs.remove._erase", lambda store: None)
        remove(store.uri, images=(IDS[8],), erase=True)
    with pytest.raises(
        UserError, match=r"has no identity 2; nothing is removed; `ceca remove .* --erase` alone finishes"
    ):
        remove(store.uri, identities=(2,))
    assert remove(store.uri, erase=True) == set()
    assert_erased(store, {IDS[4], IDS[5], IDS[8]})
    remove(store.uri, erase=True)
    assert "nothing waits to be erased" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has no image nobody, image somebody; nothing is removed$"):
        remove(store.uri, images=("nobody", "somebody"), erase=True)
    with pytest.raises(UserError, match="name what to remove"):
        remove(store.uri)


def test_nothing_is_erased_while_a_stage_works_and_no_stage_begins_while_it_is(filled):
    store = filled_with(filled)
    with holding(store, "index-1", "a job", on_lost=pytest.fail):
        with pytest.raises(UserError, match=r"until index-1 ends, which is held by a job since .* are out of search"):
            remove(store.uri, images=(IDS[1],), erase=True)
        assert len(pending_erasures(store)) == 1
    with (
        holding(store, "pipeline-a", "a job", on_lost=pytest.fail),  # whose stages hold names of their own
        undisturbed(store, Holders(store), "who erases"),
    ):
        begun = threading.Event()

        def work() -> None:
            with alone(store, "index-1"):
                begun.set()

        stage = threading.Thread(target=work)
        stage.start()
        assert not begun.wait(1.5)
    assert begun.wait(10)
    stage.join()
    remove(store.uri, erase=True)
    assert pending_erasures(store) == []


def test_the_command_knows_images_that_were_added(filled):
    store = filled_with(filled)
    rows = table_of("added", IDS[:3])
    rows = rows.set_column(0, rows.schema.field(0), [["new-1", "new-2", "new-3"]])
    rows = rows.set_column(1, rows.schema.field(1), [[77, schema.NOBODY, 3]])
    write_added(store, "digest", rows)
    store.write_json({}, "arrivals", "new-4.json")
    assert {image: who for image, who in added_images(store).items() if image.startswith("new")} == {
        "new-1": 77, "new-2": schema.NOBODY, "new-3": 3,
    }  # fmt: skip
    assert "new-4" in mentioned_images(store)
    assert remove(store.uri, identities=(77,), images=("new-2", "new-4")) == {"new-1", "new-2", "new-4"}
    assert remove(store.uri, identities=(3,), erase=True) == {IDS[6], IDS[7], "new-3"}
    with pytest.raises(UserError, match="has no identity -1"):
        remove(store.uri, identities=(schema.NOBODY,))
    assert remove(store.uri, images=tuple(IDS), erase=True) == set(IDS)  # nothing is left of the tables
    assert all(rows == [] for place, rows in state(store).items() if place != "added" and "rejects" not in place)
    assert store.current("images").rows == 0
    assert remove(store.uri, images=("new-1",)) == {"new-1"}
