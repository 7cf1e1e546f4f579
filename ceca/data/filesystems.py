"""Filesystems of URIs, writing whole objects to them, and removing from them by exact names.

Notable: fsspec takes a path with `*`, `?` or `[` for a pattern when it deletes on an object store. A dataset below
`s3://bucket/run[1]` would then lose nothing, and `s3://bucket/run1` everything. Nothing here is a pattern.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import urllib.parse
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from ceca.environment import find_proxy, on_this_machine
from ceca.errors import UserError

REMOVED_AT_ONCE = 16  # requests to an object store


class StoreError(UserError):
    """The dataset cannot be read or written, or its content is not as expected."""


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Filesystem of a URI, and the path in it. For s3://, endpoint and keys come from the AWS_* variables.

    Raises:
        StoreError: the URI is empty, its scheme is not known, or it or the endpoint's address is not valid.
    """
    if not uri:
        raise StoreError("no dataset URI given: pass --data with a folder, file://… or s3://bucket/prefix")
    uri = _absolute(uri)
    options: dict[str, Any] = {}
    if uri.startswith("s3://"):
        # Listings are not cached: another process may have published a second ago. Checksums of the S3 protocol are
        # used only where it requires them: some servers answer a range with the whole object's checksum. Parts have
        # digests in their manifest.
        checksums = ("request_checksum_calculation", "response_checksum_validation")
        # s3fs would find the endpoint by itself. fsspec caches filesystems by their options, and the endpoint among
        # them keeps two servers apart.
        endpoint = s3_endpoint()
        settings: dict[str, Any] = dict.fromkeys(checksums, "when_required")
        if on_this_machine(endpoint):  # asked directly, whatever proxy the environment names
            settings["proxies"] = {}
        options = {"use_listings_cache": False, "endpoint_url": endpoint or None, "config_kwargs": settings}
    try:
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except FileNotFoundError:
        raise StoreError(f"cannot use {uri!r}: the working folder is gone; change into one that is there") from None
    except (ValueError, ImportError) as error:
        raise StoreError(f"cannot use {uri!r}: {error}; use a folder, file://… or s3://bucket/prefix") from None
    return fs, path.rstrip("/")


def _absolute(uri: str) -> str:
    """A URI with `~` and `~user` replaced by home folders, which a shell does not do in `--data=~/people`.

    Raises:
        StoreError: there is no such home folder, or a file:// URI has no absolute path.
    """
    scheme, path = "", uri
    if uri.startswith("file:"):
        scheme, path = "file://", uri.removeprefix("file:").removeprefix("//")
    elif "://" in uri:
        return uri
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise StoreError(
            f"cannot use {uri!r}: there is no home folder {path.split('/')[0]}; a folder of that name is ./~…"
        )
    if scheme and not expanded.startswith("/"):
        raise StoreError(
            f"cannot use {uri!r}: the path of a file:// URI begins with a slash, as in file:///data/people"
        )
    return scheme + expanded


def below(root: str, *names: str) -> str:
    """Path of an object below a dataset's root. Names come from manifests too, and anybody may have written those.

    Raises:
        StoreError: the names lead out of the dataset.
    """
    if any(".." in name.split("/") for name in names):
        raise StoreError(f"{'/'.join(names)!r} leads out of the dataset {root}; nothing is read or written there")
    return "/".join([root, *names])


def s3_endpoint() -> str:
    """Address of the S3 server; empty for AWS.

    Raises:
        StoreError: it is not valid.
    """
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        endpoint = os.environ.get(variable, "")
        if not endpoint:
            continue
        try:
            parts = urllib.parse.urlsplit(endpoint)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and " " not in endpoint
        except ValueError:  # a port that is no number
            valid = False
        if not valid:
            raise StoreError(
                f"{variable}={endpoint!r} is no address of a server: write http://HOST:PORT or https://HOST"
            )
        return endpoint
    return ""


def behind_proxy() -> str:
    """Words for an error about the proxy that requests to the S3 server go through; empty if there is none."""
    endpoint = s3_endpoint() or "https://s3.amazonaws.com"
    proxy = None if on_this_machine(endpoint) else find_proxy(endpoint)
    return f", and the proxy {proxy.address} of ${proxy.variable}" if proxy else ""


def write_whole(fs: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write an object atomically: a reader sees the whole object, or the one before.

    Object stores write atomically; a local file is written under another name and then renamed.
    """
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)
        return
    with written_aside(path, content) as aside:
        os.replace(aside, path)


@contextlib.contextmanager
def written_aside(path: str, content: bytes) -> Iterator[str]:
    """Give the path of a finished local file beside another; it is removed unless it was renamed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield aside
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def comes_from_s3(error: BaseException) -> bool:
    """Whether an error is of the S3 client or was raised in it: a variable that means nothing gives a ValueError."""
    modules = [type(error).__module__]
    modules += [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(module.split(".")[0] in ("botocore", "aiobotocore", "s3fs") for module in (modules[0], modules[-1]))


def explain_s3(error: BaseException) -> str:
    """An error of the S3 client as one line that says what to check."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{words}; check the URI, AWS_ENDPOINT_URL and the other AWS_* variables{behind_proxy()}"


def remove_exactly(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Remove an object, or all objects below a folder, if there are any. The path is a name and never a pattern."""
    if isinstance(fs, LocalFileSystem):
        if fs.lexists(path):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                fs.rm(path, recursive=True)
        return
    path = path.rstrip("/")
    try:
        keys = [key for key in fs.find(path) if key == path or key.startswith(f"{path}/")]
    except FileNotFoundError:  # no such bucket
        return

    def remove(key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(key)

    with ThreadPoolExecutor(REMOVED_AT_ONCE) as removers:
        list(removers.map(remove, keys))


def as_pyarrow(fs: fsspec.AbstractFileSystem) -> pyarrow.fs.FileSystem:
    """A filesystem for programs that take pyarrow's, e.g. Ray Train; it too removes by exact names."""
    return pyarrow.fs.PyFileSystem(_Handler(fs))


class _Handler(pyarrow.fs.FSSpecHandler):
    def delete_dir(self, path: str) -> None:
        remove_exactly(self.fs, path)

    def delete_file(self, path: str) -> None:
        if not self.fs.exists(path):
            raise FileNotFoundError(path)
        remove_exactly(self.fs, path)

    def _delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        if not missing_dir_ok and not self.fs.isdir(path):
            raise FileNotFoundError(path)
        remove_exactly(self.fs, path)
