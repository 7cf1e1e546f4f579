"""Files of weights, read without running anything that a file brings along.

Notable: safetensors hold nothing but tensors. A file of `torch.save` and a TorchScript archive are zips of one pickle
and raw storages. The pickle is read by an unpickler that knows tensors and plain containers. `argparse.Namespace`,
which trainers keep beside the weights, and the module classes of TorchScript become records of their attributes; every
other class is an error.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import safetensors.torch
import torch
from torch import Tensor

from ceca.model.backbone import WeightsError

NESTED = ("state_dict", "model", "model_state_dict")  # where trainers keep weights beside the optimiser's state

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Content(NamedTuple):
    """What is in a file: weights by name, and the names of what lies beside them."""

    weights: dict[str, Tensor]
    others: list[str]


def read_weights(name: str, source: str) -> Content:
    """The content of a file of weights: safetensors, a torch file, or OpenAI's TorchScript archive.

    Args:
        name: the backbone's name, for tags.
        source: open_clip tag, local file or URI.

    Raises:
        WeightsError: it is not found, is damaged, holds code, or has no weights.
    """
    path = _find_weights(name, source)
    try:
        if path.suffix == ".safetensors":
            return Content(safetensors.torch.load_file(path), [])
        found = read_archive(path)
        found = tensors_of(found) if isinstance(found, Record) else found  # OpenAI's own files are TorchScript
    except Exception as error:
        raise WeightsError(f"{source!r} cannot be read as weights ({type(error).__name__}: {error})") from error
    others: list[str] = []
    while isinstance(found, dict) and (inner := next((key for key in NESTED if key in found), None)):
        others += [str(key) for key in found if key != inner]
        found = found[inner]
    content = found if isinstance(found, dict) else {}
    weights = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise WeightsError(f"{source!r} holds something else than named weights")
    return Content(weights, others + [str(key) for key in content if str(key) not in weights])


def _find_weights(name: str, source: str) -> Path:
    if "://" in source:
        try:
            return Path(fsspec.open_local(f"simplecache::{source}"))
        except (OSError, ValueError) as error:
            raise WeightsError(f"cannot fetch weights from {source!r}: {error}") from error
    if (path := Path(source).expanduser()).is_file():
        return path
    import open_clip  # slow to import, and only a download needs it

    tags = open_clip.list_pretrained_tags_by_model(name)
    if source not in tags:
        raise WeightsError(
            f"no weights {source!r}: not a file, not a published model, and the tags of {name} are "
            f"{', '.join(tags) or 'none'}"
        )
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, source)))
    except Exception as error:
        raise WeightsError(
            f"cannot download {name} {source!r} ({type(error).__name__}: {error}); "
            "fetch the file where there is a network and pass its path as --model.pretrained"
        ) from error


class Record:
    """Attributes of an object whose class is not loaded."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_archive(path: Path) -> Any:
    """The content of a file of `torch.save`, or the root module of a TorchScript archive as a `Record`.

    Raises:
        pickle.UnpicklingError: it holds another class than weights need; the message names it.
        OSError, RuntimeError: it cannot be read.
    """
    if not zipfile.is_zipfile(path):  # torch's format before 2020
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    reader = torch._C.PyTorchFileReader(str(path))
    return _Unpickler(io.BytesIO(reader.get_record("data.pkl")), reader).load()


def tensors_of(root: Record, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a module tree by their path, as its state dict names them."""
    found: dict[str, Tensor] = {}
    for name, value in vars(root).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, Record):
            found |= tensors_of(value, f"{prefix}{name}.")
    return found


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: io.BytesIO, reader: Any):
        super().__init__(content, encoding="utf-8")
        self.reader = reader
        self.storages: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = KNOWN.get((module, name))
        if known is not None:
            return known
        if module.startswith("__torch__"):
            return type(name, (Record,), {})  # each with a class of its own, as pickle wants
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}, and weights need tensors alone")

    def persistent_load(self, saved: Any) -> Any:
        _, dtype, key, _, count = saved
        if key not in self.storages:
            size = count * torch.empty(0, dtype=dtype).element_size()
            storage = self.reader.get_storage_from_record(f"data/{key}", size, torch.UntypedStorage)
            self.storages[key] = storage._typed_storage()._untyped_storage
        return self.storages[key], dtype


def _tensor(storage: tuple[Any, torch.dtype], offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    untyped, dtype = storage
    return torch.empty(0, dtype=dtype).set_(untyped, offset, tuple(size), tuple(stride))


def _parameter(value: Tensor, *_: Any) -> Tensor:
    return value


def _same(value: Any, *_: Any) -> Any:
    return value


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.OrderedDict,
    ("argparse", "Namespace"): Record,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): _same,
    ("torch.jit._pickle", "build_intlist"): _same,
    ("torch.jit._pickle", "build_tensorlist"): _same,
    ("torch.jit._pickle", "build_doublelist"): _same,
    ("torch.jit._pickle", "build_boollist"): _same,
    ("torch.jit._pickle", "restore_type_tag"): _same,
}
