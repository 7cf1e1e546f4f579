"""A dataset as one Lance dataset: each image with its captions and all that is known of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ceca.data.filesystems import s3_endpoint
from ceca.data.schema import TIME, TRACKLET
from ceca.data.store import Store
from ceca.data.webdataset import samples
from ceca.errors import UserError

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary()),
        *(pa.field(name, pa.string()) for name in ("image_id", "split", "camera", "source_path")),
        pa.field("identity", pa.int64()),
        TIME,
        TRACKLET,
        pa.field("captions", pa.list_(pa.string())),
        pa.field("summary", pa.string()),
    ]
)


def library() -> Any:
    """Import the library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lance
    except ImportError:
        raise UserError("Lance datasets need the package pylance: pip install 'ceca[lance]'") from None
    return lance


def open_lance(fs: Any, path: str, version: int | None = None) -> Any:
    """Open a Lance dataset.

    Args:
        fs: its filesystem.
        path: its path there.
        version: number of its version; None means the newest.

    Raises:
        UserError: the library is not installed.
        ValueError: it is no Lance dataset, or the version is gone.
    """
    uri = fs.unstrip_protocol(path)
    return library().dataset(uri, version=version, storage_options=_options(uri))


def write_lance(store: Store, out: Store, *, split: str | None = None, images_per_file: int = 1000) -> Iterator[int]:
    """Write a dataset as a Lance dataset. What is there already becomes its earlier version.

    Args:
        store: the dataset.
        out: the Lance dataset that is written.
        split: only images of this split; None means all.
        images_per_file: images in a file.

    Yields:
        The number of images in each file, once it is written. All are published together, after the last.

    Raises:
        StoreError: there are no images, or a table is damaged.
        UserError: the library is not installed.
    """
    lance = library()
    uri = out.fs.unstrip_protocol(out.root)
    images = ({**known, "image": content} for content, known in samples(store, split))
    fragments = []
    while some := list(itertools.islice(images, images_per_file)):
        table = pa.Table.from_pylist(some, SCHEMA)
        fragments += lance.fragment.write_fragments(table, uri, schema=SCHEMA, storage_options=_options(uri))
        yield len(some)
    whole = lance.LanceOperation.Overwrite(SCHEMA, fragments)
    lance.LanceDataset.commit(uri, whole, storage_options=_options(uri))


def _options(uri: str) -> dict[str, str] | None:
    """What the library does not find in the environment by itself."""
    endpoint = s3_endpoint() if uri.startswith("s3://") else None
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http:"))} if endpoint else None
