"""What the released programs of CECA and RDE compute, from weights and inputs that a rule makes.

golden/*.json.gz holds, per case, the checkpoint's names and shapes, texts, and the programs' results in fp32 on a CPU.
Each weight is drawn from its name and the case's seed, so that no weights need to be kept.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ceca.config import LossConfig, ModelConfig
from ceca.model.backbone import tokenize
from ceca.model.ceca import CECA
from ceca.model.foreign import import_checkpoint
from ceca.training.step import loss_terms

GOLDEN = Path(__file__).parent / "golden"


def weight(name: str, shape: list[int], seed: int, gate: float) -> torch.Tensor:
    """A tensor of the checkpoint by the rule that fits first."""
    n = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
    n = np.asarray(n, np.float32)
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        value = np.ones(shape)
    elif name.endswith("refiner.g"):
        value = np.full(shape, gate)
    elif last == "running_mean":
        value = 0.05 * n
    elif last == "running_var":
        value = 0.5 + 0.3 * np.abs(n)
    elif "token_embedding" in name:
        value = 0.3 * n
    elif "positional_embedding" in name or "class_embedding" in name:
        value = 0.05 * n
    elif len(shape) == 1:
        value = 1 + 0.1 * n if last == "weight" else 0.02 * n
    elif len(shape) == 4:
        value = n * 2 / np.sqrt(shape[1] * shape[2] * shape[3])
    elif name.endswith("proj"):
        value = n / np.sqrt(shape[0])
    elif "in_proj_weight" in name:
        value = n * 1.5 / np.sqrt(shape[1])
    else:
        value = n / np.sqrt(shape[1])
    return torch.from_numpy(np.asarray(value, np.float32).reshape(shape))


def pixels(count: int, seed: int) -> torch.Tensor:
    source = np.random.RandomState(seed + 2)
    low = source.standard_normal((count, 3, 12, 4))
    fine = source.standard_normal((count, 3, 384, 128))
    return torch.from_numpy((low.repeat(32, axis=2).repeat(32, axis=3) + 0.5 * fine).astype(np.float32))


class Case:
    """A case's checkpoint as a file, the model imported from it, and its inputs."""

    def __init__(self, name: str, folder: Path):
        self.values: dict[str, Any] = json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))
        seed, gate = self.values["seed"], self.values["gate"]
        state = {key: weight(key, shape, seed, gate) for key, shape in self.values["parameters"].items()}
        self.file = folder / f"{name}.pth"
        torch.save({"model": state}, self.file)
        self.config, weights = import_checkpoint(str(self.file), ModelConfig())
        self.model = CECA(self.config)
        self.model.load_state_dict(weights)
        self.images = pixels(self.values["images"], seed)
        self.captions, self.summaries = (tokenize(self.values[key]) for key in ("captions", "summaries"))

    def expected(self, name: str) -> torch.Tensor:
        return torch.tensor(self.values[name])


@pytest.fixture(scope="module")
def ceca(tmp_path_factory) -> Case:
    return Case("released_ceca", tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def rde(tmp_path_factory) -> Case:
    return Case("rde", tmp_path_factory.mktemp("golden"))


def assert_embeds_as_released(case: Case, summaries: torch.Tensor | None) -> None:
    case.model.eval()
    with torch.inference_mode():
        # The released program conditions every image on as many words as the shortest summary of its batch has.
        fewest = None if summaries is None else min(case.values["words_in_tokens"]["summaries"])
        gallery = case.model.embed_gallery(case.images, summaries, fewest)
        queries = case.model.embed_queries(case.captions)
        alone = case.model.embed_queries(case.captions[1:2])
        one = case.model.embed_gallery(case.images[2:3], None if summaries is None else summaries[2:3])
        whole_batch = case.model.embed_gallery(case.images, summaries)
    for kind, found in (("gallery", gallery), ("query", queries)):
        for part, value in zip(("global", "local"), found, strict=True):
            torch.testing.assert_close(value, case.expected(f"{kind}_{part}"), rtol=0, atol=1e-5)
    for part, whole in zip(alone, queries, strict=True):  # an embedding does not depend on its batch
        torch.testing.assert_close(part, whole[1:2], rtol=0, atol=1e-6)
    for part, whole in zip(one, whole_batch, strict=True):
        torch.testing.assert_close(part, whole[2:3], rtol=0, atol=1e-6)


def test_an_imported_rde_embeds_as_its_program_does(rde):
    assert_embeds_as_released(rde, None)


def test_an_imported_ceca_embeds_as_its_program_does(ceca):
    assert_embeds_as_released(ceca, ceca.summaries)


def test_an_imported_ceca_has_the_programs_losses_and_gradients(ceca):
    identities = torch.tensor(ceca.values["identities"])
    model = ceca.model.train()
    model.zero_grad()
    features = model(ceca.images, ceca.captions, ceca.summaries)
    terms = loss_terms(features, identities, LossConfig())
    expected = ceca.values["train_losses"]
    for ours, theirs in (("tal_global", "bge_loss"), ("tal_local", "tse_loss"), ("cawl", "merge_loss")):
        assert terms[ours].item() == pytest.approx(expected[theirs], rel=1e-4), ours
    sum(terms.values()).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    for name, norm in ceca.values["gradient_norms"].items():
        assert gradient_norm(gradients, name) == pytest.approx(norm, rel=1e-3), name


def gradient_norm(gradients: dict[str, torch.Tensor], name: str) -> float:
    """Norm of the gradient of a parameter that the released program names so."""
    side = "visual" if name.startswith("visul") else "textual"
    inside = {
        "mlp.layers.0.weight": [f"{side}_embedding.hidden.weight"],
        "refiner.g": [f"{side}_mixer.gate"],
        "refiner.sa.in_proj_weight": [f"{side}_mixer.self_attention.{part}.weight" for part in ("query", "key_value")],
        "refiner.ca.in_proj_weight": [f"{side}_mixer.cross_attention.{part}.weight" for part in ("query", "key_value")],
        "refiner.mlp.0.weight": [f"{side}_mixer.mlp.0.weight"],
    }
    rest = name.split("_emb_layer.")[-1]
    ours = inside.get(rest) or [name.replace("base_model", "backbone.clip")]
    return float(torch.cat([gradients[key].flatten() for key in ours]).norm())
