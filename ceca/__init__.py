"""CECA: text-to-image person retrieval. The library: it imports no Ray, and every function runs in one process.

>>> import ceca
>>> people = ceca.open("s3://bucket/people")
>>> people.search("a woman in a red coat", k=5)

`import ceca` is cheap: tables, torch and models are imported when something needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ceca import losses, metrics
    from ceca.people import Hits, Model, People

__version__ = "0.1.0"
__all__ = ["Hits", "Model", "People", "load", "losses", "metrics", "open"]


def open(uri: str, model: str = "", approximate: float = 0.0) -> People:
    """Open a dataset.

    Args:
        uri: the dataset: a folder, file://… or s3://bucket/prefix.
        model: name or URI of the model that searches; empty means the model that made the gallery.
        approximate: share of the images that a search compares exactly, 0 to 1 (docs/gallery.md); 0 searches exactly.
    """
    from ceca.people import People

    return People(uri, model, approximate)


def load(model: str, data: str = ".", device: str = "cpu") -> Model:
    """Load a published model.

    Args:
        model: URI or path of the model (`…/models/NAME`), or its name in a dataset.
        data: URI of the dataset in which a name is looked up.
        device: where it computes, such as `cuda`.

    Raises:
        ceca.data.store.StoreError: there is no such model, or it is damaged.
    """
    from ceca.people import Model

    return Model(model, data, device)


def __getattr__(name: str) -> Any:
    if name in ("losses", "metrics"):
        return importlib.import_module(f"ceca.{name}")
    if name in ("Hits", "Model", "People"):
        return getattr(importlib.import_module("ceca.people"), name)
    raise AttributeError(f"module 'ceca' has no attribute {name!r}")
