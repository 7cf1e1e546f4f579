"""Checkpoints of IRRA and RDE are imported, CLIP's part is exported for open_clip, and code in a file never runs."""

from __future__ import annotations

import dataclasses

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ceca.config import ModelConfig
from ceca.data.store import Store
from ceca.model.backbone import WeightsError, tokenize
from ceca.model.ceca import CECA
from ceca.model.clip import descriptions
from ceca.model.foreign import import_checkpoint
from ceca.model.weights import load_model
from jobs.weights import export_weights, import_weights

TINY = ModelConfig(backbone="ceca-tiny", image_height=128, image_width=64)


def clip_part(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of the two towers in fp16, under the names that IRRA and RDE use."""
    torch.manual_seed(seed)
    clip = CECA(dataclasses.replace(TINY, local_branch=False)).backbone.clip
    return {f"base_model.{name}": value.half() for name, value in clip.state_dict().items() if name != "attn_mask"}


class RDEEmbedding(nn.Module):
    """RDE's token embedding, written from its description, with the names of its checkpoints."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear, self.fc = nn.Linear(width, out), nn.Linear(width, out)
        self.mlp = nn.Module()
        self.mlp.layers = nn.ModuleList([nn.Linear(width, out // 2), nn.Linear(out // 2, out)])
        self.mlp.bns = nn.ModuleList([nn.BatchNorm1d(out // 2), nn.BatchNorm1d(out)])

    def forward(self, tokens: torch.Tensor, projection: nn.Linear) -> torch.Tensor:
        """Embed the selected tokens of one sample: [N, D] → [E]."""
        tokens = F.normalize(tokens, dim=-1)
        hidden = F.relu(self.mlp.bns[0](self.mlp.layers[0](tokens)))
        return (projection(tokens) + self.mlp.layers[1](hidden)).max(dim=0).values


@pytest.fixture
def rde(tmp_path):
    """An RDE checkpoint with random weights, and its two token embeddings."""
    state = clip_part()
    embeddings = {}
    for name in ("visul_emb_layer", "texual_emb_layer"):
        embedding = embeddings[name] = RDEEmbedding(128, 256).eval()
        embedding.mlp.bns[0].running_mean.uniform_(-1, 1)
        embedding.mlp.bns[0].running_var.uniform_(0.5, 2)
        state |= {f"{name}.{key}": value for key, value in embedding.state_dict().items()}
    del state["texual_emb_layer.fc.weight"], state["texual_emb_layer.fc.bias"]
    torch.save({"model": state, "epoch": 3, "optimizer": {"lr": 1e-5}}, tmp_path / "rde.pth")
    return tmp_path / "rde.pth", embeddings


def test_a_checkpoint_of_irra_becomes_a_global_model(tmp_path):
    state = clip_part()
    extra = {
        "classifier.weight": torch.zeros(5, 128),
        "mlm_head.fc.bias": torch.zeros(9),
        "ln_pre_t.bias": torch.ones(3),
    }
    torch.save({"model": {**state, **extra}, "epoch": 60}, tmp_path / "best.pth")
    config, weights = import_checkpoint(str(tmp_path / "best.pth"), TINY)
    assert (config.local_branch, config.summary_weight) == (False, 0.0)
    model = CECA(config).eval()
    model.load_state_dict(weights)
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name.replace("base_model", "backbone.clip")], value.float())


def test_a_checkpoint_of_rde_embeds_as_rde_does(rde):
    path, embeddings = rde
    config, weights = import_checkpoint(str(path), TINY)
    assert (config.mixer, config.token_ratio, config.local_dim) == ("none", 0.3, 256)
    model = CECA(config).eval()
    model.load_state_dict(weights)
    ids = tokenize(["a man in a very long grey coat with a fur collar"])
    text = model.backbone.encode_texts(ids)
    best = text.importance[0].masked_fill(~text.present[0], -1).argsort(descending=True)
    chosen = text.tokens[0, best[: min(22, int(text.present.sum()))]]
    expected = embeddings["texual_emb_layer"](chosen, embeddings["texual_emb_layer"].linear)
    torch.testing.assert_close(model.embed_queries(ids)[1][0], F.normalize(expected, dim=0), rtol=1e-4, atol=1e-5)
    image = model.backbone.encode_images(torch.randn(1, 3, 128, 64))
    best = image.importance[0].argsort(descending=True)[: 3 * 32 // 10]
    expected = embeddings["visul_emb_layer"](image.tokens[0, best], embeddings["visul_emb_layer"].fc)
    embedded = model.visual_embedding(*model._mix(None, image))[0]
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_by_name(rde, tmp_path):
    path, _ = rde
    with pytest.raises(WeightsError, match=r"positional_embedding is \[33, 128\] and not \[65, 128\]"):
        import_checkpoint(str(path), dataclasses.replace(TINY, image_width=128))
    state = torch.load(path, weights_only=True)["model"]
    torch.save({**state, "bcm.gate": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"weights that neither IRRA nor RDE has, e\.g\. bcm\.gate"):
        import_checkpoint(str(tmp_path / "other.pth"), TINY)
    torch.save({"linear.weight": torch.zeros(2)}, tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match="no checkpoint of IRRA or RDE"):
        import_checkpoint(str(tmp_path / "nothing.pth"), TINY)


class Code:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    torch.save({"model": clip_part(), "args": Code()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        import_checkpoint(str(tmp_path / "evil.pth"), TINY)


def test_an_imported_model_is_published_and_its_clip_part_loads_into_open_clip(rde, tmp_path):
    data = str(tmp_path / "data")
    settings = {"backbone": "ceca-tiny", "image_height": 128, "image_width": 64}
    first = import_weights(data, checkpoint=str(rde[0]), name="rde-published", **settings)
    assert first == import_weights(data, checkpoint=str(rde[0]), name="rde-published", **settings)
    model, published = load_model(Store(data), "rde-published")
    assert (published.global_dim, published.local_dim) == (128, 256)

    export_weights(data, tmp_path / "clip.safetensors", model="rde-published")
    open_clip.add_model_config(descriptions()["ceca-tiny"])
    clip = open_clip.create_model(
        "ceca-tiny", pretrained=str(tmp_path / "clip.safetensors"), force_image_size=(128, 64)
    )
    clip.eval()
    images, ids = torch.randn(2, 3, 128, 64), tokenize(["a red coat", "blue shoes"])
    with torch.no_grad():
        torch.testing.assert_close(
            F.normalize(clip.encode_text(ids), dim=1), model.embed_queries(ids)[0], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            F.normalize(clip.encode_image(images), dim=1), model.embed_gallery(images, None)[0], rtol=1e-4, atol=1e-5
        )
    assert clip.logit_scale.exp().item() == pytest.approx(50, rel=1e-3)
