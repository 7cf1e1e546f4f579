"""A checkpoint of each program goes through the product: import, training from it, evaluation, export."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from ceca.config import Format
from ceca.data.store import Store
from ceca.model.archive import read_weights
from ceca.model.registry import require_model
from tests.ceca.model.test_foreign import write

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

SMALL = ("--recipe", "tests/jobs/small.yaml")
TOWERS = ("--model.summary-weight", 0, "--model.no-local-branch", "--losses.terms", "infonce")
SETTINGS = {
    "open_clip": TOWERS,
    "openai": TOWERS,
    "irra": (*TOWERS, "--model.image-resize", "bilinear"),
    "rde": (
        *("--model.summary-weight", 0, "--model.token-ratio", 0.3, "--model.mixer", "none"),
        *("--losses.terms", "tal_global", "tal_local", "--model.image-resize", "bilinear"),
        *("--division", "consensus", "--last-batch", "keep"),
    ),
    "ceca": ("--model.mixer-order", "released", "--model.image-resize", "bilinear", "--model.mixer-heads", 8),
}


def test_a_checkpoint_of_each_format_is_imported_trained_evaluated_and_exported(run, drawn, tmp_path: Path) -> None:
    """The first validation of a model that starts from a published one, or from its file, is that model's own."""
    data = tmp_path / "data"
    store = Store(str(data))
    run("ingest", *SMALL, "--source", drawn, "--data", data)
    run("dialogue", *SMALL, "--data", data)
    size = ("--model.image-height", 128, "--model.image-width", 64, "--model.local-dim", 256)
    for form in get_args(Format):
        (tmp_path / form).mkdir()
        path, _ = write(form, tmp_path / form)
        imported = ("--name", form, "--backbone", "ceca-tiny", "--image-height", 128, "--image-width", 64)
        run("weights", "import", "--data", data, "--checkpoint", path, *imported)
        run("evaluate", "--data", data, "--model", form, "--split", "val", "--omega", 0.3)
        digest = require_model(store, form).digest
        own = store.read_json("evaluations", digest, "val.json")["metrics"]["fused"]
        for source in (form, path):
            name = f"{form}-from-{'file' if source == path else 'model'}"
            once = ("--epochs", 1, "--model.pretrained", source, "--name", name)
            said = run("train", *SMALL, "--data", data, *size, *SETTINGS[form], *once).stdout
            assert f"starts from {source}" in " ".join(said.split())
            model = require_model(store, name)
            first, last = model.training["history"]
            assert (first["epoch"], last["epoch"]) == (0, 1)
            for metric in ("rank1", "mean_average_precision"):
                assert first[f"val_{metric}"] == pytest.approx(own[metric], abs=1e-3), (form, source, metric)
        run("evaluate", "--data", data, "--model", name)
        out = tmp_path / f"{form}{'.safetensors' if form == 'open_clip' else '.pth'}"
        run("weights", "export", "--data", data, "--model", name, "--out", out, "--format", form)
        given, back = (read_weights("ceca-tiny", str(file)).weights for file in (path, out))
        names = {name.removeprefix("module.") for name in given} & back.keys()
        assert len(names) > 50
        assert all(torch.isfinite(back[name]).all() for name in names)
