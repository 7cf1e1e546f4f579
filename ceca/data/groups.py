"""Groups of images that are known to show one person: of a tracklet, or in the training split of an identity."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ceca.data.schema import NOBODY
from ceca.data.store import Store
from ceca.data.tables import Images
from ceca.errors import UserError

TRAIN = "train"
COLUMNS = ("split", "identity", "camera", "tracklet")


def find_groups(store: Store, images: Images, by: str) -> np.ndarray:
    """Find the groups of images.

    Args:
        store: the dataset.
        images: N images.
        by: "tracklet"; or "identity", which groups images of the training split by person, and all others by tracklet.

    Returns:
        [N] int64, number of each image's group; -1 of an image that is alone.

    Raises:
        UserError: no two images are in a group, or a tracklet has images of several people.
    """
    rows = pa.concat_tables(store.read_each(images.table, COLUMNS)).take(pa.array(images.rows))
    groups = number_groups(rows, by)
    if (groups < 0).all():
        advice = "`ceca ingest --columns tracklet=COLUMN` reads tracklets (--redo where it ran before there were any)"
        raise UserError(
            f"no two images in {store.place('images')} are of one {by}, so no summaries can agree; {advice}"
        )
    return groups


def number_groups(rows: pa.Table, by: str) -> np.ndarray:
    """Number the groups of images.

    Outside the training split nobody knows who is who: identities are what a search is asked for. They are put aside
    before anything else is done, so no result depends on them.

    Args:
        rows: COLUMNS of N images. A tracklet's name belongs to its camera and its split.
        by: as in `find_groups`.

    Returns:
        As `find_groups`.

    Raises:
        UserError: a tracklet of the training split has images of several people.
    """
    is_train = pc.equal(rows["split"], TRAIN).to_numpy(zero_copy_only=False)
    people = np.where(is_train, rows["identity"].to_numpy(), NOBODY)
    walks = np.stack([_codes(rows[name]) for name in ("split", "camera", "tracklet")])
    has_walk = walks[2] >= 0
    walk = np.where(has_walk, np.unique(walks, axis=1, return_inverse=True)[1].ravel(), -1)
    _refuse_mixed(rows, walk, people)
    by_person = (people != NOBODY) & (by == "identity")
    keys = np.stack([by_person, np.where(by_person, people, walk)])
    _, group, count = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
    group = group.ravel()
    return np.where((by_person | has_walk) & (count[group] > 1), group, -1)


def _refuse_mixed(rows: pa.Table, walk: np.ndarray, people: np.ndarray) -> None:
    """Refuse tracklets whose training images show several people: they were numbered anew for each person."""
    known = np.flatnonzero((walk >= 0) & (people != NOBODY))
    pairs = np.unique(np.stack([walk[known], people[known]]), axis=1)
    mixed, count = np.unique(pairs[0], return_counts=True)
    if (count > 1).any():
        worst = int(mixed[count > 1][0])
        row = rows.slice(int(np.flatnonzero(walk == worst)[0]), 1).to_pylist()[0]
        some = ", ".join(map(str, pairs[1][pairs[0] == worst][:3]))
        raise UserError(
            f"tracklet {row['tracklet']!r} of camera {row['camera']!r} has images of several people ({some}): "
            "give each tracklet of a camera a name of its own, and ingest again"
        )


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers of a column's values, [N]; -1 for null."""
    encoded = column.combine_chunks().dictionary_encode()
    codes: np.ndarray = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes
