"""Weights in and out: CLIP weights with another image size, and published models."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pickle
import unittest.mock

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from ceca.config import ModelConfig
from ceca.data.store import Store, StoreError
from ceca.model.backbone import Packing, WeightsError, tokenize, trim
from ceca.model.ceca import CECA
from ceca.model.clip import QuickGELU, descriptions
from ceca.model.registry import find_model
from ceca.model.weights import build_model, interpolate_positions, load_model, publish_model, serialize
from ceca.training.precision import BF16Backward

TINY = ModelConfig(backbone="ceca-tiny", image_height=128, image_width=64, mixer_heads=4, local_dim=32)
SQUARE = dataclasses.replace(TINY, image_width=128)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """CLIP weights of a square model as they are published: with the scale that nothing here uses."""
    torch.manual_seed(3)
    state = dict(CECA(SQUARE).backbone.clip.state_dict())
    path = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    state["logit_scale"] = torch.tensor(4.6)
    safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def test_clip_weights_of_a_square_image_load_into_a_tall_one(clip_file):
    model = build_model(dataclasses.replace(TINY, pretrained=str(clip_file)))
    given = safetensors.torch.load_file(clip_file)
    own = model.backbone.clip.state_dict()
    torch.testing.assert_close(own["token_embedding.weight"], given["token_embedding.weight"])
    positions = given["visual.positional_embedding"]
    torch.testing.assert_close(own["visual.positional_embedding"], interpolate_positions(positions, (8, 4)))
    torch.testing.assert_close(own["visual.positional_embedding"][0], positions[0])


def test_positions_are_interpolated_bilinearly_from_the_square_grid():
    positions = torch.randn(1 + 14 * 14, 6)
    found = interpolate_positions(positions, (24, 8))
    grid = positions[1:].T.reshape(1, 6, 14, 14)
    expected = F.interpolate(grid, size=(24, 8), mode="bilinear").reshape(6, -1).T
    assert found.shape == (193, 6)
    torch.testing.assert_close(found[1:], expected)


def test_weights_of_a_zip_of_tensors_load_too_and_never_unpickle_code(clip_file, tmp_path):
    torch.save({"state_dict": safetensors.torch.load_file(clip_file)}, tmp_path / "clip.pt")
    build_model(dataclasses.replace(SQUARE, pretrained=str(tmp_path / "clip.pt")))
    torch.save({"state_dict": Unpicklable()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="cannot be read"):
        build_model(dataclasses.replace(SQUARE, pretrained=str(tmp_path / "evil.pt")))


class Unpicklable:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


def test_a_pickle_that_hides_behind_a_torchscript_name_is_refused_too(tmp_path):
    (tmp_path / "ViT-B-16.pt").write_bytes(pickle.dumps({"state_dict": Unpicklable()}))
    with pytest.raises(WeightsError, match="cannot be read"):
        build_model(dataclasses.replace(SQUARE, pretrained=str(tmp_path / "ViT-B-16.pt")))


class Archive(nn.Module):
    """A module tree that holds tensors by the names they are published under, as OpenAI's archives do."""

    def hold(self, name: str, value: torch.Tensor) -> None:
        first, _, rest = name.partition(".")
        if not rest:
            self.register_buffer(first, value)
            return
        if not hasattr(self, first):
            self.add_module(first, Archive())
        getattr(self, first).hold(rest, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def openai_archive(tmp_path_factory):
    """A CLIP checkpoint in OpenAI's format: a TorchScript archive in fp16 of a model for square images."""
    torch.manual_seed(5)
    root = Archive()
    for name, value in CECA(SQUARE).backbone.clip.state_dict().items():
        root.hold(name, value.half())
    for name, value in {"logit_scale": 4.6, "input_resolution": 128, "context_length": 77, "vocab_size": 49408}.items():
        root.hold(name, torch.tensor(value))
    path = tmp_path_factory.mktemp("openai") / "ViT-B-16.pt"
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), str(path))
    return path


def test_a_checkpoint_in_openais_format_loads_with_interpolated_positions(openai_archive):
    with pytest.raises(RuntimeError):  # it is no plain torch file
        torch.load(openai_archive, weights_only=True)
    given = torch.jit.load(str(openai_archive)).state_dict()
    own = build_model(dataclasses.replace(TINY, pretrained=str(openai_archive))).backbone.clip.state_dict()
    assert len(own) > 40
    for name, value in own.items():
        if name == "visual.positional_embedding":
            torch.testing.assert_close(value, interpolate_positions(given[name].float(), (8, 4)))
            assert value.shape[0] == 1 + 8 * 4
        elif name != "attn_mask":
            assert torch.equal(value, given[name].float()), name


def test_weights_of_another_model_are_refused_by_name(clip_file, tmp_path):
    given = safetensors.torch.load_file(clip_file)
    del given["ln_final.weight"]
    safetensors.torch.save_file(given, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"ln_final\.weight"):
        build_model(dataclasses.replace(SQUARE, pretrained=str(tmp_path / "part.safetensors")))


def test_an_unknown_tag_lists_the_known_ones():
    with pytest.raises(WeightsError, match="openai"):
        build_model(ModelConfig(pretrained="opeani"))


def test_the_published_size_is_193_tokens_of_512():
    model = CECA(ModelConfig())
    assert model.global_dim == 512
    assert model.backbone.clip.visual.positional_embedding.shape[0] == 1 + 24 * 8
    assert all(parameter.ndim > 0 for parameter in model.parameters())  # DeepSpeed refuses scalars


@pytest.fixture
def published(tmp_path):
    torch.manual_seed(0)
    model = CECA(TINY).eval()
    store = Store(str(tmp_path))
    made = publish_model(
        store, "m", serialize(model.state_dict()), model=TINY, config={}, training={}, made_from={}, version="v"
    )
    return store, model, made


def test_a_published_model_embeds_as_before(published):
    store, model, made = published
    loaded, found = load_model(store, "m")
    assert found == made == find_model(store, "m")
    assert (found.global_dim, found.local_dim) == (128, 32)
    ids = trim(tokenize(["a man in a red coat"]))
    for before, after in zip(model.embed_queries(ids), loaded.embed_queries(ids), strict=True):
        torch.testing.assert_close(before, after)


def test_published_weights_reload_bit_for_bit(published):
    store, model, _ = published
    loaded, _ = load_model(store, "m")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_a_model_is_found_by_uri_from_another_dataset(published, tmp_path):
    store, _, made = published
    assert find_model(Store(str(tmp_path / "elsewhere")), f"{store.uri}/models/m").digest == made.digest


def test_a_missing_model_lists_those_there_are(published):
    with pytest.raises(StoreError, match=r"there: m\)"):
        load_model(published[0], "n")


def test_damaged_weights_are_an_error_that_says_where(published):
    store, _, made = published
    store.write_bytes(b"short", "models", "m", made.digest, "model.safetensors")
    with pytest.raises(StoreError, match="damaged"):
        load_model(store, "m")


def test_weights_and_settings_that_were_not_published_are_refused(tmp_path):
    store, model = Store(str(tmp_path)), CECA(TINY)
    made = publish_model(
        store, "m", serialize(model.state_dict()), model=TINY, config={}, training={}, made_from={}, version="v"
    )
    load_model(store, "m")
    others = serialize(CECA(TINY).state_dict())
    settings = json.dumps({"model": {**made.config["model"], "mixer_order": "released"}}).encode()
    manifest = json.dumps({**store.read_json("models", "m", "manifest.json"), "weights_sha256": "0" * 64}).encode()
    for replaced, content in (
        ((made.digest, "model.safetensors"), others),
        ((made.digest, "config.json"), settings),
        (("manifest.json",), manifest),
    ):
        before = store.read_bytes("models", "m", *replaced)
        store.write_bytes(content, "models", "m", *replaced)
        with pytest.raises(StoreError, match="is damaged: it does not hold what was published"):
            load_model(store, "m")
        store.write_bytes(before, "models", "m", *replaced)
    load_model(store, "m")


# --- what an embedding depends on -------------------------------------------------------------------------


def test_padding_and_the_other_texts_of_a_batch_never_change_an_embedding(published):
    _, model, _ = published
    alone = model.embed_queries(trim(tokenize(["a woman"])))
    together = model.embed_queries(tokenize(["a woman", "a man in a very long grey coat with a fur collar"]))
    for one, many in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], many[0], rtol=1e-4, atol=1e-5)


def test_without_summary_weight_a_summary_changes_nothing():
    torch.manual_seed(0)
    model = CECA(dataclasses.replace(TINY, summary_weight=0.0)).eval()
    images = torch.randn(1, 3, 128, 64)
    one = model.embed_gallery(images, tokenize(["a red coat"]))
    other = model.embed_gallery(images, tokenize(["blue shoes"]))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def open_clips(model: CECA) -> torch.nn.Module:
    """open_clip's own module with the weights of a model's towers."""
    import open_clip  # slow to import

    open_clip.add_model_config(descriptions()["ceca-tiny"])
    config = model.config
    size = (config.image_height, config.image_width)
    clip = open_clip.create_model(config.backbone, pretrained=None, force_image_size=size, load_weights=False)
    missing, unknown = clip.load_state_dict(model.backbone.clip.state_dict(), strict=False)
    assert (missing, unknown) == (["logit_scale"], [])
    return clip.eval()


def test_tower_features_are_open_clips_own(published):
    _, model, _ = published
    clip, images, ids = open_clips(model), torch.randn(2, 3, 128, 64), tokenize(["a red coat", "blue shoes"])
    torch.testing.assert_close(
        model.backbone.encode_images(images).summit, clip.encode_image(images), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model.backbone.encode_texts(ids).summit, clip.encode_text(ids), rtol=1e-4, atol=1e-5)


def test_importance_is_the_last_blocks_attention_from_the_class_token(published):
    _, model, _ = published
    clip, images = open_clips(model), torch.randn(2, 3, 128, 64)
    visual, seen = clip.visual, {}
    block = visual.transformer.resblocks[-1]
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    clip.encode_image(images)
    handle.remove()
    normed = block.ln_1(seen["x"])
    _, weights = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)
    found = model.backbone.encode_images(images).importance
    torch.testing.assert_close(found, weights[:, 0, 1:], rtol=1e-4, atol=1e-6)


# --- texts without their padding --------------------------------------------------------------------------


def test_packed_texts_give_the_tokens_and_gradients_of_padded_ones():
    ids = tokenize(["a woman", "a man in a very long grey coat with a fur collar", ""])
    found = []
    for pack in (True, False):
        torch.manual_seed(0)
        backbone = CECA(TINY).backbone
        if not pack:
            backbone.encode_texts = functools.partial(padded, backbone)
        tokens = backbone.encode_texts(ids)
        (tokens.tokens * tokens.present[..., None]).square().sum().backward()
        kept = {"importance": tokens.importance * tokens.present, "summit": tokens.summit, "present": tokens.present}
        gradients = {n: p.grad for n, p in backbone.clip.named_parameters() if p.grad is not None}
        found.append(kept | {"tokens": tokens.tokens * tokens.present[..., None]} | gradients)
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 30
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name].float(), value.float(), rtol=1e-4, atol=1e-5, msg=name)


def padded(backbone, ids):
    """encode_texts as a device takes it, which is not asked where texts end."""
    with unittest.mock.patch.object(Packing, "of", lambda there: Packing(None, *there.shape)):
        return type(backbone).encode_texts(backbone, ids)


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_and_recomputation_change_neither_features_nor_gradients(recompute):
    ids = trim(tokenize(["a red coat", "blue shoes and a hat", "a man", "a woman with a bag"]))
    images = torch.randn(4, 3, 128, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for micro_batch in (None, 1):
        torch.manual_seed(0)
        model = CECA(TINY).train()
        model.micro_batch, model.backbone.recompute = micro_batch, recompute and micro_batch is not None
        features = model(images, ids, ids.flip(0))
        sum(value.square().sum() for value in features if value is not None).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({n: v.detach() for n, v in features._asdict().items() if v is not None} | gradients)
    whole = torch.cat([value.flatten() for value in found[0].values()]).norm()
    for name, value in found[0].items():
        assert (found[1][name] - value).norm() <= 1e-5 * max(value.norm(), 1e-3 * whole), name


def test_bf16_gradients_leave_the_features_alone_and_are_nearly_those_of_fp32():
    ids = trim(tokenize(["a red coat", "blue shoes and a hat"]))
    images = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for mode in (contextlib.nullcontext(), BF16Backward()):
        torch.manual_seed(0)
        model = CECA(TINY).train()
        with mode:
            features = model(images, ids, ids)
        sum(value.square().sum() for value in features if value is not None).backward()
        found.append((features, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for exact, low in zip(found[0][0], found[1][0], strict=True):
        assert (exact is None and low is None) or torch.equal(exact, low)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.999
    assert found[1][1].norm() / found[0][1].norm() == pytest.approx(1, abs=0.01)


def test_quick_gelu_is_open_clips_and_so_is_its_gradient():
    x = torch.linspace(-6, 6, 101, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    assert torch.autograd.gradcheck(QuickGELU(), (x,))


class Evil(nn.Module):
    """torch.jit.load would run its `__setstate__`."""

    @torch.jit.export
    def __getstate__(self) -> int:
        return 0

    @torch.jit.export
    def __setstate__(self, state: int) -> None:
        raise RuntimeError("ran")


def test_code_of_a_torchscript_archive_does_not_run(tmp_path):
    torch.jit.script(Evil()).save(str(tmp_path / "evil.pt"))
    with pytest.raises(torch.jit.Error, match="ran"):
        torch.jit.load(str(tmp_path / "evil.pt"))
    with pytest.raises(WeightsError):
        build_model(dataclasses.replace(SQUARE, pretrained=str(tmp_path / "evil.pt")))
