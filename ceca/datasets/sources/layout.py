"""A published layout as a source: its annotation file, its folder imgs/, and its published counts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

from ceca.data.store import Reject
from ceca.datasets.layouts import Annotations, Layout, read_annotations, read_attributes
from ceca.datasets.records import Record
from ceca.datasets.sources.files import Files
from ceca.datasets.sources.source import Source


@dataclasses.dataclass
class LayoutSource(Source):
    """A dataset in a published layout. Its annotation file decides the records, wherever the folder lies.

    Attributes:
        uri: the dataset's folder.
    """

    uri: str = ""

    @classmethod
    def of(cls, fs: Any, root: str, uri: str, layout: Layout) -> LayoutSource:
        """The dataset in a folder."""
        return cls(layout.name, layout.annotation, Files(fs, root, ("imgs", "")), lambda: (), uri=uri)

    @functools.cached_property
    def annotations(self) -> Annotations:
        return read_annotations(self.uri, self.name)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.annotations.content).hexdigest()

    @functools.cached_property
    def attributes(self) -> dict[str, Any] | None:  # type: ignore[override]
        return read_attributes(self.files.fs, self.files.root)

    def records(self) -> Iterator[Record | Reject]:
        yield from self.annotations.rejects
        truth = self.attributes or {"images": ()}
        tracklets = {image["path"]: image.get("tracklet") for image in truth["images"]}
        for record in self.annotations.records:
            yield dataclasses.replace(record, tracklet=tracklets.get(record.source_path))
