"""Checkpoints of IRRA and RDE are imported, CLIP's part is exported for open_clip, and code in a file never runs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import get_args

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from ceca.config import Format, ModelConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.model.archive import read_weights
from ceca.model.backbone import WeightsError, tokenize
from ceca.model.ceca import CECA
from ceca.model.clip import descriptions
from ceca.model.foreign import import_checkpoint
from ceca.model.weights import load_model, start_model
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


class Refiner(nn.Module):
    """The mixer of the released CECA program, with the names of its checkpoints."""

    def __init__(self, width: int):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(-2.5))
        self.ln_q, self.ln_c = nn.LayerNorm(width), nn.LayerNorm(width)
        self.sa, self.ca = nn.MultiheadAttention(width, 8), nn.MultiheadAttention(width, 8)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def rde_state(mixed: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, RDEEmbedding]]:
    """Random weights of RDE, or of the released CECA program, and the two token embeddings."""
    state = clip_part()
    embeddings = {}
    for name in ("visul_emb_layer", "texual_emb_layer"):
        embedding = embeddings[name] = RDEEmbedding(128, 256).eval()
        embedding.mlp.bns[0].running_mean.uniform_(-1, 1)
        embedding.mlp.bns[0].running_var.uniform_(0.5, 2)
        state |= {f"{name}.{key}": value for key, value in embedding.state_dict().items()}
        if mixed:
            state |= {f"{name}.refiner.{key}": value for key, value in Refiner(128).state_dict().items()}
    del state["texual_emb_layer.fc.weight"], state["texual_emb_layer.fc.bias"]
    return state, embeddings


@pytest.fixture
def rde(tmp_path):
    """An RDE checkpoint with random weights, and its two token embeddings."""
    state, embeddings = rde_state()
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
    torch.save({**state, "visul_emb_layer.bcm.gate": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"that neither RDE nor CECA has, e\.g\. visul_emb_layer\.bcm\.gate"):
        import_checkpoint(str(tmp_path / "other.pth"), TINY)
    torch.save({**state, "base_model.visual.adapter": torch.zeros(1)}, tmp_path / "adapted.pth")
    with pytest.raises(WeightsError, match=r"visual\.adapter is not known"):
        import_checkpoint(str(tmp_path / "adapted.pth"), TINY)
    torch.save({"linear.weight": torch.zeros(2)}, tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match="no checkpoint of CLIP, IRRA or RDE"):
        import_checkpoint(str(tmp_path / "nothing.pth"), TINY)


class Code:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    torch.save({"model": clip_part(), "args": Code()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        import_checkpoint(str(tmp_path / "evil.pth"), TINY)


# --- every format: import, start a training, export ---------------------------------------------------------


@functools.cache
def contents(form: str) -> dict[str, torch.Tensor]:
    """A checkpoint of this format with random fp32 weights, names of PyTorch's wrapper for many GPUs where usual."""
    clip = {name: value.float() for name, value in clip_part().items()}
    heads = {"classifier.weight": torch.zeros(5, 128), "mlm_head.fc.bias": torch.zeros(9), "mllm.new": torch.zeros(1)}
    match form:
        case "irra":
            return {f"module.{name}": value for name, value in {**clip, **heads}.items()}
        case "rde" | "ceca":
            return {name: value.float() for name, value in rde_state(mixed=form == "ceca")[0].items()}
    towers = {name.removeprefix("base_model."): value for name, value in clip.items()}
    return {**towers, "logit_scale": torch.tensor(50.0).log()}


NOT_USED = {
    "irra": {"module.classifier.weight", "module.mlm_head.fc.bias", "module.mllm.new", "args", "optimizer"},
    "open_clip": {"logit_scale"},
    "openai": {"logit_scale", "args", "optimizer"},
}


def write(form: str, folder) -> tuple[str, dict[str, torch.Tensor]]:
    """The file, with arguments and an optimiser beside the weights where a format has such, and its weights."""
    state = contents(form)
    if form == "open_clip":
        safetensors.torch.save_file(state, folder / "file.safetensors")
        return str(folder / "file.safetensors"), state
    beside = {"args": argparse.Namespace(lr=1e-5, names=["a"]), "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    content = {**state, **beside} if form == "openai" else {"model": state, **beside}
    torch.save(content, folder / "file.pth")
    return str(folder / "file.pth"), state


@functools.cache
def not_used(form: str) -> set[str]:
    local = {
        name
        for name in contents(form)
        if "num_batches" in name or ".bns.1." in name or name.startswith("visul_emb_layer.linear")
    }
    return NOT_USED.get(form, {"args", "optimizer"} | local)


@pytest.mark.parametrize("form", get_args(Format))
def test_a_file_is_imported_starts_a_training_and_is_given_back(form, tmp_path, capsys):
    path, _ = write(form, tmp_path)
    data, settings = str(tmp_path / "data"), {"backbone": "ceca-tiny", "image_height": 128, "image_width": 64}
    made = import_weights(data, checkpoint=path, name="imported", **settings)
    assert made.protocol == ("validation" if form in ("open_clip", "openai") else "released")
    assert set(made.training["not_used"]) == not_used(form)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"not used of the file: {', '.join(sorted(not_used(form)))}" in printed
    model, _ = load_model(Store(data), "imported")
    assert model.config.image_resize == ("bicubic" if form in ("open_clip", "openai") else "bilinear")

    # The published model, by name or URI, and the file itself start a training of the same settings as they are.
    for source in (f"{data}/models/imported" if form == "rde" else "imported", path):
        start = start_model(dataclasses.replace(model.config, pretrained=source), Store(data))
        assert start.at_random == ()
        assert set(start.not_used) == (not_used(form) if source == path else set())
        for name, value in start.model.published_state().items():
            assert torch.equal(value, model.state_dict()[name]), name

    suffix = ".safetensors" if form == "open_clip" else ".pth"
    export_weights(data, tmp_path / f"back{suffix}", model="imported", format=form)
    given, back = (read_weights("ceca-tiny", name).weights for name in (path, str(tmp_path / f"back{suffix}")))
    given = {name.removeprefix("module."): value for name, value in given.items() if name not in not_used(form)}
    assert given.keys() <= back.keys()
    assert all(torch.equal(back[name], value) for name, value in given.items())
    again = import_checkpoint(str(tmp_path / f"back{suffix}"), TINY)[1]
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_other_methods_start_from_what_fits_and_say_what_does_not(tmp_path):
    """RDE gives the token embeddings to CECA, whose mixers start at random; the released mixer fits its order only."""
    rde_file, _ = write("rde", tmp_path)
    config = dataclasses.replace(TINY, local_dim=256, pretrained=rde_file)
    start = start_model(config)
    assert (start.kind, start.at_random) == ("RDE", ("visual_mixer", "textual_mixer"))
    given = contents("rde")["visul_emb_layer.fc.weight"]
    assert start.model.visual_embedding.linear.weight.shape == given.shape
    assert "visul_emb_layer.fc.weight" not in start.not_used

    wider = start_model(dataclasses.replace(config, local_dim=64))
    assert "visul_emb_layer.fc.weight" in wider.not_used
    assert set(wider.at_random) == {"visual_mixer", "textual_mixer", "visual_embedding", "textual_embedding"}

    ceca_file, _ = write("ceca", tmp_path)
    for order, at_random in (("released", ()), ("alternating", ("visual_mixer", "textual_mixer"))):
        start = start_model(dataclasses.replace(config, mixer_order=order, pretrained=ceca_file))
        assert start.at_random == at_random
        assert ("visul_emb_layer.refiner.sa.in_proj_weight" in start.not_used) == bool(at_random)

    larger = start_model(dataclasses.replace(config, image_height=256))  # 8 x 4 patches become 16 x 4
    assert larger.model.backbone.clip.visual.positional_embedding.shape[0] == 1 + 16 * 4


def test_a_format_without_a_place_for_a_model_says_so(tmp_path, capsys):
    data, settings = str(tmp_path / "data"), {"backbone": "ceca-tiny", "image_height": 128, "image_width": 64}
    import_weights(data, checkpoint=write("rde", tmp_path)[0], name="rde", **settings)
    with pytest.raises(UserError, match=r"the format ceca has no place for this model \(mixer none"):
        export_weights(data, tmp_path / "x.pth", model="rde", format="ceca")
    with pytest.raises(UserError, match=r"--out must end in \.pt or \.pth for the format rde"):
        export_weights(data, tmp_path / "x.safetensors", model="rde", format="rde")
    export_weights(data, tmp_path / "x.pth", model="rde", format="irra")
    printed = " ".join(capsys.readouterr().err.split())
    assert "this format has no place for textual_embedding.hidden.bias, textual_embedding.hidden.weight" in printed
    assert import_checkpoint(str(tmp_path / "x.pth"), TINY)[0].local_branch is False


def test_an_imported_model_is_published_and_its_clip_part_loads_into_open_clip(rde, tmp_path):
    data = str(tmp_path / "data")
    settings = {"backbone": "ceca-tiny", "image_height": 128, "image_width": 64}
    first = import_weights(data, checkpoint=str(rde[0]), name="rde-published", **settings)
    assert first == import_weights(data, checkpoint=str(rde[0]), name="rde-published", **settings)
    model, published = load_model(Store(data), "rde-published")
    assert (published.global_dim, published.local_dim) == (128, 256)

    export_weights(data, tmp_path / "clip.safetensors", model="rde-published")
    import open_clip  # slow to import

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

    # A longer context is open_clip's, too, once it is told.
    import_weights(data, checkpoint=str(tmp_path / "clip.safetensors"), name="long", context=168, **settings)
    export_weights(data, tmp_path / "long.safetensors", model="long")
    long, told = load_model(Store(data), "long")[0], {"force_image_size": (128, 64), "force_context_length": 168}
    theirs = open_clip.create_model("ceca-tiny", pretrained=str(tmp_path / "long.safetensors"), **told).eval()
    ids = tokenize(["a red coat", "a man in a grey coat " * 20 + "with a bag"], 168)
    with torch.no_grad():
        torch.testing.assert_close(
            F.normalize(theirs.encode_text(ids), dim=1), long.embed_queries(ids)[0], rtol=1e-4, atol=1e-5
        )
