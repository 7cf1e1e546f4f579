"""`ceca open`: from a folder to a gallery, again with what is new; once with its search page."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch
from PIL import Image

from ceca.config import IngestConfig, ModelConfig
from ceca.data.store import Store
from ceca.datasets.drawn import draw_dataset
from ceca.errors import UserError
from ceca.model.registry import list_models, require_model
from ceca.model.weights import build_model
from ceca.search.searcher import Searcher
from cluster.object_store import free_port
from jobs.ingest import ingest
from jobs.open import main, open_pictures, place_beside
from tests.conftest import REPOSITORY

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


def draw(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (32, 64), COLOURS[number % len(COLOURS)]).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of CLIP weights, as people hand it on."""
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(backbone="ceca-tiny", local_branch=False, mixer="none", image_height=128, image_width=128)
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in model.backbone.clip.state_dict().items()}, path
    )
    return path


@pytest.mark.usefixtures("without_ray")
def test_a_folder_becomes_a_gallery_and_the_same_command_adds_what_is_new(tmp_path: Path, weights: Path, capsys):
    folder = draw(tmp_path / "in", "a.png", "b.png", "c.png")
    given = ["--pretrained", str(weights), "--backbone", "ceca-tiny", "--no-serve"]
    main([str(folder), *given])
    store = Store(f"{folder}-ceca")
    first = store.current("gallery")
    (name,) = list_models(store)
    assert re.fullmatch("clip-[0-9a-f]{8}-ceca-tiny", name)
    assert (first.rows, first.notes["model"]) == (3, name)
    assert require_model(store, name).config["model"]["image_width"] == 128
    assert len(Searcher(store).search("a man in red", omega=0.3, top_k=5)) == 3

    capsys.readouterr()
    main([str(folder), *given])
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("lacks nothing") == 2
    assert store.current("gallery") == first

    draw(folder, "d.png", "e.png")
    main([str(folder), *given])
    assert "3 rows stay where they are, 0 are copied, 2 images are embedded" in " ".join(
        capsys.readouterr().err.split()
    )
    assert store.current("gallery").rows == 5

    (folder / "a.png").unlink()
    main([str(folder), *given])
    assert "1 images are gone from the source" in " ".join(capsys.readouterr().err.split())
    hits = Searcher(store).search("a man in red", omega=0.3, top_k=9)
    assert len(hits) == 4

    Image.new("RGB", (32, 64), "purple").save(folder / "b.png")  # another picture under a name that is known
    ingest(store.uri, IngestConfig(source=str(folder)), redo=True)
    capsys.readouterr()
    main([str(folder), *given])
    assert "1 images are embedded" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("without_ray")
def test_with_an_engine_images_are_described_once(drawn: Path, tmp_path: Path, weights: Path, capsys):
    data = str(tmp_path / "data")
    given = ["--data", data, "--pretrained", str(weights), "--backbone", "ceca-tiny", "--engine", "oracle"]
    main([str(drawn), *given, "--no-serve"])
    store = Store(data)
    assert store.current("dialogues").rows == store.current("gallery").rows == 72
    assert store.current("gallery").notes["model"].endswith("-summaries")
    capsys.readouterr()
    main([str(drawn), *given, "--no-serve"])
    said = " ".join(capsys.readouterr().err.split())
    assert "no image lacks one" in said
    assert said.count("lacks nothing") == 2


@pytest.mark.usefixtures("without_ray")
def test_a_model_that_uses_summaries_needs_an_engine(tmp_path: Path):
    from tests.serve.dataset import publish_tiny

    publish_tiny(Store(str(tmp_path / "data")), "tiny", seed=0)
    folder = draw(tmp_path / "in", "a.png")
    with pytest.raises(UserError, match="uses summaries: give --engine"):
        open_pictures(str(folder), str(tmp_path / "data"), pretrained="tiny")


def test_the_dataset_lies_beside_its_source(tmp_path: Path):
    (tmp_path / "a.b").mkdir()
    assert place_beside(f"{tmp_path}/a.b/") == f"{tmp_path}/a.b-ceca"
    assert place_beside("lists/people.csv") == "lists/people-ceca"
    assert place_beside(".") == f"{Path.cwd()}-ceca"
    assert place_beside("..") == f"{Path.cwd().parent}-ceca"
    with pytest.raises(UserError, match="give --data"):
        place_beside("s3://bucket/pictures")


@pytest.mark.slow
@pytest.mark.long
def test_a_hundred_pictures_are_searched_on_the_page_and_ten_more_are_added(tmp_path: Path, weights: Path):
    draw_dataset(
        tmp_path / "drawn", seed=1, identities=37, images_per_identity=3, split_identities=(25, 6, 6), workers=1
    )
    pictures = sorted(path for path in (tmp_path / "drawn" / "imgs").rglob("*") if path.is_file())[:110]
    assert len(pictures) == 110
    folder = tmp_path / "in"
    folder.mkdir()

    def run(count: int) -> tuple[float, list[dict], str]:
        for number, picture in enumerate(pictures[:count]):
            (folder / f"{number}.jpg").write_bytes(picture.read_bytes())
        port, begun = free_port(), time.monotonic()
        command = [sys.executable, "-m", "jobs.cli", "open", str(folder), "--pretrained", str(weights)]
        command += ["--backbone", "ceca-tiny", "--port", str(port)]
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=said, text=True)
            try:
                assert process.stdout is not None
                address = next((line for line in process.stdout if line.startswith("http://")), "").strip()
                said.seek(0)
                assert address, said.read()
                query = {"query": "a man in a red shirt", "top_k": 200}
                hits = httpx.post(f"{address}/v1/search", json=query, timeout=30).json()["hits"]
                took = time.monotonic() - begun
                assert "<html" in httpx.get(address, timeout=30).text
                process.send_signal(signal.SIGINT)
                process.wait(60)
                said.seek(0)
                return took, hits, said.read()
            finally:
                process.kill()

    took, hits, _ = run(100)
    assert took < 180
    assert len({hit["image_id"] for hit in hits}) == 100
    _, hits, said = run(110)
    assert len({hit["image_id"] for hit in hits}) == 110
    assert re.search(r"100 rows stay where they are, 0 are copied, 10 images\s+are embedded", said), said
