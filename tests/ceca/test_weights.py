"""Weights in and out: CLIP weights with another image size, and published models."""

from __future__ import annotations

import dataclasses

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from ceca.config import ModelConfig
from ceca.model.backbone import WeightsError, tokenize, trim
from ceca.model.ceca import CECA
from ceca.model.weights import build_model, find_model, interpolate_positions, load_model, publish_model, serialize
from ceca.store import Store, StoreError

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


def test_tower_features_are_open_clips_own(published):
    _, model, _ = published
    clip, images, ids = model.backbone.clip, torch.randn(2, 3, 128, 64), tokenize(["a red coat", "blue shoes"])
    torch.testing.assert_close(
        model.backbone.encode_images(images).summit, clip.encode_image(images), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model.backbone.encode_texts(ids).summit, clip.encode_text(ids), rtol=1e-4, atol=1e-5)


def test_importance_is_the_last_blocks_attention_from_the_class_token(published):
    _, model, _ = published
    visual, images = model.backbone.clip.visual, torch.randn(2, 3, 128, 64)
    seen = {}
    block = visual.transformer.resblocks[-1]
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    model.backbone.clip.encode_image(images)
    handle.remove()
    normed = block.ln_1(seen["x"])
    _, weights = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)
    found = model.backbone.encode_images(images).importance
    torch.testing.assert_close(found, weights[:, 0, 1:], rtol=1e-4, atol=1e-6)
