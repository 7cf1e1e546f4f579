"""A checkpoint of each program goes through the product: import, training from it, evaluation, export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from ceca.config import Format
from ceca.data.store import Store
from ceca.model.archive import read_weights
from ceca.model.registry import require_model
from jobs.weights import export_weights, import_weights
from tests.ceca.model.test_foreign import write
from tests.jobs.conftest import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

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


@pytest.fixture(scope="module")
def data(told: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(told, tmp_path_factory.mktemp("formats") / "data")


@pytest.mark.parametrize("form", get_args(Format))
def test_a_checkpoint_of_each_format_is_imported_trained_evaluated_and_exported(
    form: str, run, data: Path, tmp_path: Path
) -> None:
    """The first validation of a model that starts from a published one, or from its file, is that model's own."""
    store = Store(str(data))
    path, _ = write(form, tmp_path)
    import_weights(str(data), path, form, backbone="ceca-tiny", image_height=128, image_width=64)
    run("evaluate", "--data", data, "--model", form, "--split", "val", "--omega", 0.3)
    own = store.read_json("evaluations", require_model(store, form).digest, "val.json")["metrics"]["fused"]
    size = ("--model.image-height", 128, "--model.image-width", 64, "--model.local-dim", 256)
    for source, name in ((form, f"{form}-from-model"), (path, f"{form}-from-file")):
        once = ("--epochs", 1, "--model.pretrained", source, "--name", name)
        said = run("train", *SMALL, "--data", data, *size, *SETTINGS[form], *once).stdout
        assert f"starts from {source}" in " ".join(said.split())
        first, last = require_model(store, name).training["history"]
        assert (first["epoch"], last["epoch"]) == (0, 1)
        for metric in ("rank1", "mean_average_precision"):
            assert first[f"val_{metric}"] == pytest.approx(own[metric], abs=1e-3), (source, metric)
    assert ("clean" in last) == (form == "rde")
    run("evaluate", "--data", data, "--model", name)
    out = tmp_path / f"back{'.safetensors' if form == 'open_clip' else '.pth'}"
    export_weights(str(data), out, name, form)
    given, back = (read_weights("ceca-tiny", str(file)).weights for file in (path, out))
    names = {name.removeprefix("module.") for name in given} & back.keys()
    assert len(names) > 50
    assert all(torch.isfinite(back[name]).all() for name in names)
