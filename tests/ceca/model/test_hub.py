"""Models on the hub: pushed to a folder, to a server like the hub, and loaded from both."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

import ceca
from ceca.config import ModelConfig
from ceca.data.names import MANIFEST
from ceca.data.store import Store, StoreError
from ceca.errors import UserError
from ceca.model import hub
from ceca.model.registry import find_model, require_model
from jobs.push import push
from tests.serve.dataset import draw_person, publish_tiny, summarize

IMAGES = [draw_person(number) for number in range(3)]
TEXTS = ["a woman in a red coat", "a man in black"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("models") / "data"))
    _, published = publish_tiny(store, "tiny", seed=0)
    metrics = {"rank1": 61.5, "rank5": 80.0, "rank10": 90.0, "mean_average_precision": 55.25}
    sizes = {"split": "test", "omega": 0.3, "queries": 6156, "gallery": 3074}
    store.write_json({**sizes, "metrics": {"fused": metrics}}, "evaluations", published.digest, "test.json")
    return store


@pytest.fixture(scope="module")
def folder(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pushed") / "tiny"
    push("tiny", data=store.uri, folder=out)
    return out


def same_embeddings(one: ceca.Model, other: ceca.Model) -> bool:
    told = [summarize(number) for number in range(3)]
    pairs = zip(
        (*one.embed_gallery(IMAGES, told), *one.embed_queries(TEXTS)),
        (*other.embed_gallery(IMAGES, told), *other.embed_queries(TEXTS)),
        strict=True,
    )
    return all(np.array_equal(left, right) for left, right in pairs)


def test_a_pushed_folder_is_a_model_with_the_same_embeddings(store: Store, folder: Path):
    assert same_embeddings(ceca.load("tiny", store.uri), ceca.load(str(folder)))
    with pytest.raises(UserError, match="is not empty"):
        push("tiny", data=store.uri, folder=folder)
    with pytest.raises(UserError, match=r"owner/name, or give --folder; found 'tiny'"):
        push("tiny", "tiny", data=store.uri)


def test_open_clip_loads_the_clip_part(folder: Path):
    import open_clip  # slow to import

    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    ours = ceca.load(str(folder))
    state = theirs.state_dict()
    for name, value in ours.ceca.backbone.clip.state_dict().items():
        assert torch.equal(state[name], value), name
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.inference_mode():
        features = torch.nn.functional.normalize(theirs.encode_text(tokens), dim=1).numpy()
    assert features == pytest.approx(ours.embed_queries(TEXTS)[0], abs=1e-5)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert tuple(preprocess(Image.new("RGB", (50, 90))).shape) == (3, 128, 64)


def test_the_card_says_what_the_records_say(store: Store, folder: Path):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: open_clip\n")
    for words in ("`ceca-tiny`, 128×64 pixels", "| test | 0.3 | 6,156 | 3,074 | 61.50 |", "## Intended use"):
        assert words in card
    assert "A person must check every hit" in " ".join(card.split())
    assert "Protocol: `validation`" in card


class FakeHub:
    """The hub's requests that the client library makes for a model: in memory, on a port of this machine."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # repository → path → content
        self.private: dict[str, bool] = {}
        app = FastAPI()
        app.post("/api/repos/create")(self.create)
        app.post("/api/models/{owner}/{name}/preupload/{revision}")(self.preupload)
        app.post("/api/models/{owner}/{name}/commit/{revision}")(self.commit)
        app.get("/api/models/{owner}/{name}")(self.about)
        app.get("/api/models/{owner}/{name}/revision/{revision}")(self.about)
        app.get("/api/models/{owner}/{name}/tree/{revision}")(self.tree)
        app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])(self.resolve)
        app.post("/api/validate-yaml")(lambda: {"errors": [], "warnings": []})
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(5)

    def sha(self, repository: str) -> str:
        kept = {path: hashlib.sha256(content).hexdigest() for path, content in self.files[repository].items()}
        return hashlib.sha1(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    async def create(self, request: Request) -> Response:
        body = await request.json()
        repository = f"{body.get('organization') or 'owner'}/{body['name']}"
        if not request.headers.get("authorization"):
            return JSONResponse({"error": "Invalid username or password."}, status_code=401)
        self.private[repository] = body.get("private", False) or body.get("visibility") == "private"
        self.files.setdefault(repository, {})
        return JSONResponse({"url": f"{self.url}/{repository}", "name": repository, "id": repository})

    async def preupload(self, request: Request, owner: str, name: str, revision: str) -> dict:
        files = (await request.json())["files"]
        return {
            "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files],
            "commitOid": self.sha(f"{owner}/{name}"),
        }

    async def commit(self, request: Request, owner: str, name: str, revision: str) -> dict:
        repository = f"{owner}/{name}"
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.files[repository][entry["value"]["path"]] = content
        sha = self.sha(repository)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repository}/commit/{sha}"}

    async def about(self, owner: str, name: str, revision: str = "main") -> Response:
        repository = f"{owner}/{name}"
        if repository not in self.files:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return JSONResponse({"error": "Repository not found"}, status_code=404, headers=headers)
        siblings = [{"rfilename": path} for path in self.files[repository]]
        return JSONResponse({"id": repository, "sha": self.sha(repository), "siblings": siblings, "private": False})

    async def tree(self, owner: str, name: str, revision: str) -> list:
        kept = self.files[f"{owner}/{name}"]
        about = [(path, len(content), hashlib.sha1(content).hexdigest()) for path, content in kept.items()]
        return [{"type": "file", "path": path, "size": size, "oid": oid} for path, size, oid in about]

    async def resolve(self, request: Request, owner: str, name: str, revision: str, path: str) -> Response:
        content = self.files[f"{owner}/{name}"].get(path)
        if content is None:
            return JSONResponse({"error": "not found"}, status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return Response(content, headers={"ETag": etag, "X-Repo-Commit": self.sha(f"{owner}/{name}")})


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A server like the hub, and a cache of its own."""
    from huggingface_hub import constants

    server = FakeHub()
    monkeypatch.setattr(hub, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # tests ask nobody but this server
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)  # it has a protocol of its own
    hub.fetch.cache_clear()
    yield server
    server.close()
    hub.fetch.cache_clear()


def test_a_model_goes_to_the_hub_and_comes_back(store: Store, folder: Path, fake: FakeHub, tmp_path: Path):
    push("tiny", "owner/tiny", data=store.uri, private=True)
    assert fake.private == {"owner/tiny": True}
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(fake.files["owner/tiny"]) == written
    published = require_model(store, "hf://owner/tiny")
    assert published.uri == "hf://owner/tiny"
    assert published.digest == require_model(store, "tiny").digest
    assert same_embeddings(ceca.load("tiny", store.uri), ceca.load("hf://owner/tiny"))
    fetched = {path.name for path in Path(hub.fetch("hf://owner/tiny")).rglob("*") if path.is_file()}
    assert MANIFEST in fetched
    assert "open_clip_model.safetensors" not in fetched
    with pytest.raises(StoreError, match=r"hf://owner/other cannot be fetched: .*404"):
        find_model(store, "hf://owner/other")
    with pytest.raises(StoreError, match="write hf://owner/name"):
        find_model(store, "hf://tiny")


def test_a_hub_that_cannot_be_reached_is_said(store: Store, fake: FakeHub):
    fake.close()
    with pytest.raises(StoreError, match="owner/tiny cannot be uploaded"):
        push("tiny", "owner/tiny", data=store.uri)
    with pytest.raises(StoreError, match="hf://owner/tiny cannot be fetched"):
        find_model(store, "hf://owner/tiny")


def test_a_damaged_copy_is_refused(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (weights,) = copy.glob("*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        ceca.load(str(copy))


def test_a_model_on_the_hub_may_be_where_training_starts(store: Store, fake: FakeHub):
    from ceca.model.weights import start_model

    push("tiny", "owner/tiny", data=store.uri)
    config = ModelConfig(
        backbone="ceca-tiny",
        image_height=128,
        image_width=64,
        mixer_heads=4,
        local_dim=256,
        pretrained="hf://owner/tiny",
    )
    started = start_model(config, store)
    assert started.kind == "published model"
    assert not started.at_random
