"""Remove: take images out of search, at once; the next index with --only-missing writes a gallery without them.

    ceca remove --data s3://bucket/cuhk --images 0123456789abcdef
    ceca remove --data s3://bucket/cuhk --identities 17 18

A removal is an object of its own below removed/, so that two at a time lose nothing and a gallery made later leaves
the images out too.
"""

from __future__ import annotations

import time
from typing import Annotated

import tyro

from ceca.errors import UserError
from ceca.samples import list_images
from ceca.store import Store, version_of
from jobs import stages


def remove(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    images: Annotated[tuple[str, ...], tyro.conf.arg(help="ids of images")] = (),
    identities: Annotated[tuple[int, ...], tyro.conf.arg(help="people, all of whose images are removed")] = (),
) -> set[str]:
    """Take images out of search. Returns their ids."""
    store = Store(data)
    rows = list_images(store, store.current("images", "ingest"))
    chosen = {row.image_id for row in rows if row.image_id in images or row.identity in identities}
    unknown = [f"image {name}" for name in set(images) - {row.image_id for row in rows}]
    unknown += [f"identity {number}" for number in set(identities) - {row.identity for row in rows}]
    if unknown:
        raise UserError(f"{store.uri} has no {', '.join(sorted(unknown))}; nothing is removed")
    if not chosen:
        raise UserError("name what to remove: --images ID … or --identities N …")
    name = f"{version_of(sorted(chosen))}.json"
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    store.write_json({"images": sorted(chosen), "created": made}, "removed", name)
    stages.console.print(
        f"remove: {len(chosen)} images are out of search for all that open the gallery from now on "
        f"(to take it back, remove {store.place('removed', name)})"
    )
    stages.console.print("remove: `ceca index --only-missing` writes the gallery's parts without them")
    return chosen


def main(argv: list[str] | None = None) -> None:
    tyro.cli(remove, args=argv, prog="ceca remove", description="Take images out of search.")


if __name__ == "__main__":
    stages.entry(main)
