"""Remove: take images out of search at once; with --erase, also erase them from everything below the dataset's URI.

    ceca remove --data s3://bucket/cuhk --images 0123456789abcdef
    ceca remove --data s3://bucket/cuhk --identities 17 18 --erase
    ceca remove --data s3://bucket/cuhk --erase                        finish what was interrupted

A removal is a separate object below removed/: two removals at the same time lose nothing, and a gallery that is made
later leaves the images out too. Without --erase, the next index with --only-missing writes a gallery without the
images, and everything else stays. An erasure waits for no stage: it is refused while a stage works. Stages wait for an
erasure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import tyro

from ceca.data.changes import added_images, hide, mentioned_images, pending_erasures
from ceca.data.erase import Busy, Watch, finish, undisturbed
from ceca.data.keys import spelled
from ceca.data.lease import Holders, LeaseError, this_process
from ceca.data.schema import NOBODY
from ceca.data.store import Store
from ceca.data.tables import find_images
from ceca.errors import UserError
from jobs.runtime.console import Track, console, entry

NOT_REACHED = (
    "copies elsewhere (the source of ingest, backups, reports, and shards below CECA_CACHE of machines that searched, "
    "which are removed at the next search there, or after 30 days), models trained with the images, which keep what "
    "they learned, embeddings of images that had a common summary with them (until `ceca index --only-missing`), "
    "and, in a bucket, earlier versions of objects and unfinished uploads, which the bucket's lifecycle rules remove. "
    "Running services follow by themselves"
)


def remove(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    images: Annotated[tuple[str, ...], tyro.conf.arg(help="ids of images")] = (),
    identities: Annotated[tuple[int, ...], tyro.conf.arg(help="people; all their images are removed")] = (),
    erase: Annotated[bool, tyro.conf.arg(help="also erase all data about these images, permanently")] = False,
) -> set[str]:
    """Take images out of search, or erase them.

    Returns the ids of the images.
    """
    store = Store(data)
    chosen: set[str] = set()
    if images or identities:
        chosen = choose(store, images, identities)
        name = hide(store, chosen, erase)
        back = "" if erase else f" (to take it back, remove {store.place('removed', f'{name}.json')})"
        console.print(f"remove: {len(chosen)} images are out of search from now on{back}")
        if not erase:
            console.print("remove: `ceca index --only-missing` writes the gallery's parts without them")
    elif not erase:
        raise UserError("name what to remove: --images ID … or --identities N …")
    if erase:
        _erase(store)
    return chosen


def choose(store: Store, images: tuple[str, ...], identities: tuple[int, ...]) -> set[str]:
    """Ids of the given images and of all images of the given people.

    Raises:
        UserError: the dataset has no such image or identity.
    """
    manifest = store.current("images", "ingest")
    identity_of = added_images(store)
    if manifest.rows:
        found = find_images(store, manifest)
        identity_of |= dict(zip(spelled(found.keys), found.identities.tolist(), strict=True))
    missing = [f"image {name}" for name in set(images) - identity_of.keys() - mentioned_images(store)]
    missing += [f"identity {number}" for number in set(identities) - (set(identity_of.values()) - {NOBODY})]
    if missing:
        pending = pending_erasures(store)
        hint = f"; `ceca remove --data {store.uri} --erase` alone finishes an erasure that was interrupted"
        raise UserError(f"{store.uri} has no {', '.join(sorted(missing))}; nothing is removed{hint if pending else ''}")
    return {*images, *(name for name, identity in identity_of.items() if identity in identities)}


def _erase(store: Store) -> None:
    """Erase all removed images that wait for it, also those of an interrupted run, and print the number of rows.

    Raises:
        UserError: a stage or another erasure is at work.
    """
    names = pending_erasures(store)
    if not names:
        console.print("erase: nothing waits to be erased")
        return
    try:
        with undisturbed(store, Holders(store), this_process()) as lease, _progress() as watch:
            erased = finish(store, *names, watch=watch, check=lease.check)
    except (Busy, LeaseError) as error:
        later = f"run `ceca remove --data {store.uri} --erase` when that has ended"
        raise UserError(f"{error}; the images are out of search, {later}") from None
    counts = ", ".join(f"{rows:,} of {table}" for table, rows in erased.items())
    console.print(f"erase: {counts or 'nothing was left'} (rows, in all versions)")
    console.print(f"erase: not reached are {NOT_REACHED}")


@contextlib.contextmanager
def _progress() -> Iterator[Watch]:
    """Show the progress of each phase of an erasure."""
    tracks: dict[str, Track] = {}
    with contextlib.ExitStack() as shown:

        def watch(doing: str, total: int) -> None:
            if doing not in tracks:
                shown.close()  # the phase before
                tracks[doing] = shown.enter_context(Track(doing, total, unit="objects"))
            tracks[doing].advance(1)

        yield watch


def main(argv: list[str] | None = None) -> None:
    tyro.cli(remove, args=argv, prog="ceca remove", description="Take images out of search, or erase them.")


if __name__ == "__main__":
    entry(main)
