"""A dataset in the form that Hugging Face's `datasets` loads: Parquet files of each split, and a card."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ceca.data.schema import TIME
from ceca.data.store import Store
from ceca.data.webdataset import ending, samples

SPLITS = {"val": "validation"}  # their names there
ROW_GROUP = 100  # their viewer's own; a row is read without the others of the file


def _text(name: str) -> tuple[pa.Field, dict[str, Any]]:
    return pa.field(name, pa.string()), {"dtype": "string", "_type": "Value"}


# Arrow's field and the library's own description of each column; a picture is bytes and a name.
COLUMNS: list[tuple[pa.Field, dict[str, Any]]] = [
    (pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), {"_type": "Image"}),
    _text("image_id"),
    (pa.field("identity", pa.int64()), {"dtype": "int64", "_type": "Value"}),
    _text("camera"),
    (TIME, {"dtype": "timestamp[us, tz=UTC]", "_type": "Value"}),
    _text("tracklet"),
    _text("source_path"),
    (pa.field("captions", pa.list_(pa.string())), {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}),
    _text("summary"),
]
DESCRIBED = {"info": {"features": {field.name: feature for field, feature in COLUMNS}}}
SCHEMA = pa.schema([field for field, _ in COLUMNS], {"huggingface": json.dumps(DESCRIBED)})

CARD = """---
task_categories:
- text-to-image
- image-to-text
tags:
- person-retrieval
configs:
- config_name: default
  data_files:
{files}---

# Pictures of people with captions

{count:,} pictures, written by `ceca export huggingface` from version `{version}` of the table of images.
`identity` is the number of the person, null where nobody said; `summary` was written by a multimodal model. The
pictures show people: the terms of their source hold for every copy.

```python
from datasets import load_dataset

people = load_dataset("this folder or owner/name")
```
"""


def write_parquet(store: Store, out: Store, *, split: str | None = None, images_per_file: int = 1000) -> Iterator[int]:
    """Write a dataset as `data/<split>-000000.parquet`, …, and README.md, the card that names the splits.

    Args:
        store: the dataset.
        out: where they are written.
        split: only images of this split; None means all.
        images_per_file: images in a file.

    Yields:
        The number of images in each file, once it is written.

    Raises:
        StoreError: there are no images, a table is damaged, or the files cannot be written.
    """
    held: dict[str, list[dict[str, Any]]] = defaultdict(list)
    files: Counter[str] = Counter()
    total = 0

    def write(name: str) -> int:
        rows = held.pop(name)
        sink = io.BytesIO()
        table = pa.Table.from_pylist(rows, SCHEMA)
        pq.write_table(table, sink, row_group_size=ROW_GROUP, write_page_index=True)
        out.write_bytes(sink.getvalue(), "data", f"{name}-{files[name]:06}.parquet")
        files[name] += 1
        return len(rows)

    for content, known in samples(store, split):
        name = SPLITS.get(known["split"], known["split"])
        picture = {"bytes": content, "path": f"{known['image_id']}.{ending(content)}"}
        held[name].append({**known, "image": picture})
        total += 1
        if len(held[name]) == images_per_file:
            yield write(name)
    for name in sorted(held):
        yield write(name)
    listed = "".join(f"  - split: {name}\n    path: data/{name}-*.parquet\n" for name in sorted(files))
    card = CARD.format(files=listed, count=total, version=store.current("images", "ingest").version)
    out.write_bytes(card.encode(), "README.md")
