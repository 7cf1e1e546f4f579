"""Garbage: versions of tables and models that nothing names any more. It is found here, and removed only on demand.

These stay:

    the current version of every table and model, and the newest ones of each
    every version that they name: what a gallery, a model or an evaluation was made from
    captions and attributes of images that stay
    every part that a manifest or a receipt of unfinished work names, whatever version it was written for
    everything else below the dataset's URI: nothing is removed that is not recognised as one of the above
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ceca.data.names import ADDED, EVALUATIONS, MANIFEST, MODELS, PART, TURNS, WORK
from ceca.data.replacing import Check, unchecked
from ceca.data.store import READERS, Store, StoreError

BELONGING = ("captions", "attributes")  # tables whose version is that of their images
MODEL = {"config.json", "training.json", "model.safetensors", "curve.parquet"}  # objects of a published model

Version = tuple[str, str]  # table, version


@dataclasses.dataclass(frozen=True)
class Garbage:
    """Something that nothing names.

    Attributes:
        what: its table and version, for people.
        since: when it was written, UTC.
        objects: paths below the dataset, in the order in which they are removed.
        bytes: their size.
    """

    what: str
    since: str
    objects: tuple[str, ...]
    bytes: int


class Listing:
    """All objects below a dataset's URI, and what the manifests among them say.

    Raises:
        StoreError: a manifest, a receipt or an evaluation cannot be read, so what it names is not known.
    """

    def __init__(self, store: Store):
        self.store = store
        inside = _inside(store)
        self.sizes = {name: size for name, size in store.sizes().items() if inside(name)}
        self.current: dict[str, dict[str, Any]] = {}  # table → its manifest
        self.versions: dict[Version, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}  # model → the digest that is published
        self.made_from: list[Mapping[str, str]] = []  # of models and evaluations
        evaluation = re.compile(rf"{EVALUATIONS}/[^/]+/[^/]+\.json")
        named = [name for name in self.sizes if name.endswith(f"/{MANIFEST}") or evaluation.fullmatch(name)]
        with ThreadPoolExecutor(READERS) as readers:
            for name, record in zip(named, readers.map(store.read_json, named), strict=True):
                self._understand(name, record)
        self.parts_in_work = {
            f"{table}/{part['path']}" for receipt in self._receipts() for table, part in receipt["parts"].items()
        }

    def _understand(self, name: str, record: Any) -> None:
        if not isinstance(record, dict):
            raise StoreError(f"{self.store.place(name)} is no record, so gc cannot know what it names; remove it")
        folder = name.removesuffix(f"/{MANIFEST}")
        table, version = record.get("table"), record.get("version")
        if folder.startswith(f"{MODELS}/"):
            if isinstance(record.get("digest"), str):
                self.digests[folder.removeprefix(f"{MODELS}/")] = record["digest"]
                self.made_from.append({"model": record["digest"], **record.get("made_from", {})})
        elif folder == name:  # an evaluation
            self.made_from.append({"model": str(record.get("model_digest")), **record.get("made_from", {})})
        elif table is not None and folder in (table, f"{table}/{version}"):
            parts = record.get("parts")
            if not isinstance(parts, list) or not all(isinstance(part, dict) and "path" in part for part in parts):
                raise StoreError(f"{self.store.place(name)} lists no parts, so gc cannot know what it names; remove it")
            if folder == table:
                self.current[table] = record
            else:
                self.versions[table, str(version)] = record

    def _receipts(self) -> Iterator[dict[str, Any]]:
        for name in self.sizes:
            if name.startswith(f"{WORK}/") and name.endswith(".json"):
                yield self.store.read_record(name, kind="a receipt", fields={"parts": dict}) or {"parts": {}}

    def below(self, *folders: str) -> list[str]:
        """Objects directly in a folder."""
        folder = "/".join(folders)
        return [name for name in self.sizes if name.rpartition("/")[0] == folder]

    def written(self, name: str) -> str:
        """When an object was written, UTC."""
        time = self.store.fs.modified(self.store.path(name))
        return time.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _inside(store: Store) -> Any:
    """Tells whether an object is below the dataset's folder: behind a link in it may be another's."""
    if not isinstance(store.fs, LocalFileSystem):
        return lambda name: True
    root = os.path.realpath(store.root)
    return lambda name: os.path.realpath(store.path(name)) == f"{root}/{name}"


def find_garbage(store: Store, keep: int = 1, older_than: float = 0) -> list[Garbage]:
    """Find what nothing names.

    Args:
        store: the dataset.
        keep: this number of the newest versions of each table and model stays in any case.
        older_than: only what was written at least this number of days ago.

    Raises:
        StoreError: as of `Listing`.
    """
    listing = Listing(store)
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=min(older_than, 700_000))  # of all years
    limit = f"{before:%4Y-%m-%dT%H:%M:%SZ}"
    stays, digests = _staying(listing, keep)
    goes = {
        (table, version): manifest
        for (table, version), manifest in listing.versions.items()
        if (table, version) not in stays and table in listing.current and manifest.get("created", "") <= limit
    }
    left = [manifest for version, manifest in listing.versions.items() if version not in goes]
    named = {
        f"{manifest['table']}/{part['path']}"
        for manifest in (*listing.current.values(), *left)
        for part in manifest["parts"]
    }
    unnamed = _unnamed_parts(listing, named | listing.parts_in_work)
    found = []
    for (table, version), manifest in sorted(goes.items()):
        objects = [f"{table}/{version}/{MANIFEST}", *listing.below(table, version, TURNS)]
        objects += sorted(unnamed.pop((table, version), ()))
        found.append(_garbage(listing, f"{table} {version}", manifest["created"], objects))
    for (table, version), parts in sorted(unnamed.items()):
        since = max(map(listing.written, parts))
        if since <= limit:
            found.append(_garbage(listing, f"{table} {version}: parts that no manifest names", since, sorted(parts)))
    return found + [model for model in _models(listing, digests, keep) if model.since <= limit]


def _staying(listing: Listing, keep: int) -> tuple[set[Version], set[str]]:
    """The versions of tables, and the digests of models, that are current, new, or named by one that stays."""
    by_table: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for (table, version), manifest in listing.versions.items():
        by_table[table].append((manifest.get("created", ""), version))
    waiting = [(table, manifest["version"]) for table, manifest in listing.current.items()]
    waiting += [(table, version) for table, all_of in by_table.items() for _, version in sorted(all_of)[-keep:] if keep]
    digests = set(listing.digests.values())
    digests |= {name.split("/")[1] for name in listing.sizes if name.startswith(f"{ADDED}/")}

    def name(made_from: Mapping[str, str], table: str = "") -> None:
        # A table that names its own earlier version has taken over its parts; nobody reads it by that name.
        waiting.extend((other, version) for other, version in made_from.items() if other != table)
        digests.add(made_from.get("model", ""))

    for made_from in listing.made_from:
        name(made_from)
    for table, manifest in listing.current.items():
        name(manifest.get("made_from", {}), table)
    stays: set[Version] = set()
    while waiting:
        found = waiting.pop()
        if found in stays or found not in listing.versions:
            continue
        stays.add(found)
        name(listing.versions[found].get("made_from", {}), found[0])
        if found[0] == "images":
            waiting += [(table, found[1]) for table in BELONGING]
            waiting += [
                other
                for other, manifest in listing.versions.items()
                if other[0] in BELONGING and manifest.get("made_from", {}).get("images") == found[1]
            ]
    return stays, digests


def _unnamed_parts(listing: Listing, named: set[str]) -> dict[Version, set[str]]:
    """Parts of published tables that are not among these, by table and version."""
    found: dict[Version, set[str]] = defaultdict(set)
    for name in listing.sizes.keys() - named:
        part = PART.fullmatch(name)
        if part is not None and part["table"] in listing.current:
            found[part["table"], part["version"]].add(name)
    return found


def _models(listing: Listing, digests: set[str], keep: int) -> list[Garbage]:
    """Models that another one has replaced under its name, except those that something names."""
    objects: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in listing.sizes:
        folders = name.split("/")
        if len(folders) == 4 and folders[0] == MODELS and folders[1] in listing.digests:
            objects[folders[1], folders[2]].append(name)
    found = []
    for model in listing.digests:
        folders_of = {digest: names for (of, digest), names in objects.items() if of == model}
        whole = {
            digest: names
            for digest, names in folders_of.items()
            if re.fullmatch("[0-9a-f]{16}", digest) and {name.rpartition("/")[2] for name in names} <= MODEL
        }
        since = {digest: max(map(listing.written, names)) for digest, names in whole.items()}
        newest = sorted(whole, key=lambda digest: (since[digest], digest))[-keep:] if keep else []
        found += [
            _garbage(listing, f"{MODELS}/{model} {digest}", since[digest], sorted(whole[digest]))
            for digest in sorted(whole.keys() - digests - set(newest))
        ]
    return found


def _garbage(listing: Listing, what: str, since: str, objects: Iterable[str]) -> Garbage:
    names = tuple(name for name in objects if name in listing.sizes)
    return Garbage(what, since, names, sum(listing.sizes[name] for name in names))


def remove_garbage(store: Store, garbage: Iterable[Garbage], check: Check = unchecked) -> None:
    """Remove what was found. A version's manifest goes first, so that nobody takes up a version that lacks parts.

    Args:
        store: the dataset.
        garbage: what goes.
        check: called before each object; raises an error if stages may have begun meanwhile (`Lease.check`).
    """
    for found in garbage:
        for name in found.objects:
            check()
            store.remove(name)
            if isinstance(store.fs, LocalFileSystem):
                with contextlib.suppress(OSError):  # it holds something else
                    os.rmdir(os.path.dirname(store.path(name)))
