"""gc: versions of tables and models that nothing names any more, and their size; with --apply they are removed.

    ceca gc --data s3://bucket/cuhk
    ceca gc --data s3://bucket/cuhk --keep 3 --older-than 30 --apply

Current versions stay, and so does what galleries, models and evaluations were made from (ceca/data/garbage.py). No
stage may work on the dataset meanwhile; stages wait until it has ended.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from ceca.data.erase import COLLECTING, Busy, undisturbed
from ceca.data.garbage import Garbage, find_garbage, remove_garbage
from ceca.data.lease import Holders, LeaseError, this_process
from ceca.data.names import MODELS
from ceca.data.store import Store
from ceca.errors import UserError
from jobs.runtime.console import console, entry, text_table


def gc(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    keep: Annotated[int, tyro.conf.arg(help="newest versions of each table and model that stay in any case")] = 1,
    older_than: Annotated[float, tyro.conf.arg(help="only what was written at least this number of days ago")] = 0,
    apply: Annotated[bool, tyro.conf.arg(help="remove it, permanently; without, nothing is changed")] = False,
) -> list[Garbage]:
    """Find what nothing names any more, print it, and remove it if `apply` is true."""
    if keep < 0 or not older_than >= 0:
        raise UserError(f"--keep and --older-than are numbers from 0; found {keep} and {older_than:g}")
    store = Store(data)
    if not store.names(MODELS):
        store.current("images", "ingest")  # an error where there is no dataset at all
    if not apply:
        found = find_garbage(store, keep, older_than)
        _print(store, found)
        console.print(f"gc: would remove {_size(found)}; --apply removes it" if found else "gc: nothing to remove")
        return found
    try:
        with undisturbed(store, Holders(store), this_process(), COLLECTING) as lease:
            found = find_garbage(store, keep, older_than)
            _print(store, found)
            remove_garbage(store, found, lease.check)
    except (Busy, LeaseError) as error:
        raise UserError(f"{error}; run the same command again when that has ended") from None
    console.print(f"gc: removed {_size(found)}" if found else "gc: nothing to remove")
    return found


def _print(store: Store, found: list[Garbage]) -> None:
    if not found:
        return
    table = text_table(store.uri, "what", "written", "objects", "MB", left="what")
    for garbage in found:
        table.add_row(garbage.what, garbage.since, f"{len(garbage.objects):,}", f"{garbage.bytes / 1e6:,.1f}")
    console.print(table)


def _size(found: list[Garbage]) -> str:
    objects, size = sum(len(garbage.objects) for garbage in found), sum(garbage.bytes for garbage in found)
    return f"{objects:,} objects, {size:,} bytes"


def main(argv: list[str] | None = None) -> None:
    description = "Find versions of tables and models that nothing names any more, and remove them with --apply."
    tyro.cli(gc, args=argv, prog="ceca gc", description=description)


if __name__ == "__main__":
    entry(main)
