"""Texts beyond CLIP's 77 tokens: positions, equal embeddings of short texts, and a context that is carried along."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ceca
from ceca.config import ModelConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.evaluation.statistics import share_cut
from ceca.model.backbone import WeightsError, tokenize
from ceca.model.card import model_card
from ceca.model.ceca import CECA
from ceca.model.embed import embed_images, embed_texts
from ceca.model.foreign import import_checkpoint, lengthen_positions
from ceca.model.registry import find_model
from ceca.model.tokens import count_tokens
from ceca.model.weights import load_model, publish_model, serialize, start_model
from ceca.settings import ConfigError
from jobs.push import push
from jobs.weights import export_weights, import_weights

TINY = ModelConfig(backbone="ceca-tiny", image_height=128, image_width=64, mixer_heads=4, local_dim=32)
LONG = dataclasses.replace(TINY, context=168)
SIZE = {"backbone": "ceca-tiny", "image_height": 128, "image_width": 64}
SHORT = ["a woman in a red coat", "a man", "a person with a blue backpack, white shoes and long black hair"]
START = "a man in a grey coat " * 20  # 102 tokens with start and end
ENDS = [START + "with a red bag", START + "with a blue hat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a CLIP that reads 77 tokens, for images of this size."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    state = CECA(TINY).backbone.clip.state_dict()
    safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Store:
    """A dataset with the same weights published as a model of 77 tokens and as one of 168."""
    store = Store(str(tmp_path_factory.mktemp("data")))
    import_weights(store.uri, checkpoint=str(clip), name="clip77", **SIZE)
    import_weights(store.uri, checkpoint=str(clip), name="clip168", context=168, **SIZE)
    return store


# --- positions -------------------------------------------------------------------------------------------


def test_from_77_to_248_three_places_lie_between_two_positions_as_in_long_clip() -> None:
    positions = torch.arange(77.0)[:, None] ** 2
    long = lengthen_positions(positions, 248)[:, 0].tolist()
    assert long[:20] == [place**2 for place in range(20)]
    assert long[20:25] == [400, 410.25, 420.5, 430.75, 441]  # quarters of the way from 20² to 21²
    assert long[244:] == [5776, 5813.75, 5851.5, 5889.25]  # behind 76², by quarters of 76² - 75² = 151


@given(st.integers(77, 600))
@settings(max_examples=20)
def test_positions_on_a_line_stay_on_it_and_the_first_twenty_stay_as_they_are(context: int) -> None:
    positions = torch.stack([torch.arange(77.0), 5 - 2 * torch.arange(77.0)], dim=1)
    long = lengthen_positions(positions, context)
    assert long.shape == (context, 2)
    assert torch.equal(long[:20], positions[:20])
    factor = (context - 20) / 57
    expected = 20 + torch.arange(context - 20) / factor
    torch.testing.assert_close(long[20:, 0], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(long[20:, 1], 5 - 2 * expected, rtol=1e-5, atol=1e-3)


def test_the_same_context_changes_nothing() -> None:
    positions = torch.randn(77, 4)
    assert lengthen_positions(positions, 77) is positions


# --- embeddings ------------------------------------------------------------------------------------------


def test_short_texts_embed_as_by_the_clip_that_was_imported(store: Store) -> None:
    assert max(map(count_tokens, SHORT)) <= 20
    models = [load_model(store, name)[0] for name in ("clip77", "clip168")]
    assert [model.config.context for model in models] == [77, 168]
    for before, after in zip(*(embed_texts(model, SHORT) for model in models), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_a_ceca_model_keeps_its_local_embeddings_of_short_texts_too(ratio: float) -> None:
    torch.manual_seed(0)
    model = CECA(dataclasses.replace(TINY, token_ratio=ratio)).eval()
    longer = CECA(dataclasses.replace(LONG, token_ratio=ratio)).eval()
    state = model.state_dict()
    name = "backbone.clip.positional_embedding"
    longer.load_state_dict({**state, name: lengthen_positions(state[name], 168)})
    pixels = [image.numpy() for image in torch.randint(0, 256, (3, 128, 64, 3), dtype=torch.uint8)]
    for embed in (lambda one: embed_texts(one, SHORT), lambda one: embed_images(one, pixels, SHORT)):
        for before, after in zip(embed(model), embed(longer), strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_a_longer_context_reads_what_77_tokens_cut(store: Store) -> None:
    short, long = (embed_texts(load_model(store, name)[0], ENDS)[0] for name in ("clip77", "clip168"))
    assert torch.equal(short[0], short[1])
    assert not torch.allclose(long[0], long[1], atol=1e-4)


def test_texts_are_cut_at_the_context_and_end_with_the_end() -> None:
    ids = tokenize(["word " * 400, "a man"], 168)
    assert ids.shape == (2, 168)
    assert (ids[0, -1], (ids[0] > 0).sum()) == (49407, 168)
    assert torch.equal(ids[1, :77], tokenize(["a man"])[0])
    assert not ids[1, 77:].any()


def test_the_share_of_cut_texts_counts_those_beyond_the_context() -> None:
    assert [share_cut([*SHORT, *ENDS], context) for context in (77, 168)] == [0.4, 0]
    assert share_cut([], 77) == 0


def test_short_texts_pass_the_tower_without_the_padding_of_the_context() -> None:
    """The towers see as many tokens as the longest text has, whatever the context."""
    longest = max(map(count_tokens, SHORT))
    for config in (TINY, LONG):
        encoded = CECA(config).eval().backbone.encode_texts(tokenize(SHORT, config.context))
        assert encoded.tokens.shape == (3, longest, 128)


def test_the_released_mixer_reads_77_tokens_only() -> None:
    with pytest.raises(ConfigError, match="released computes with the padding of 77 tokens, found context 168"):
        dataclasses.replace(LONG, mixer_order="released")
    dataclasses.replace(LONG, mixer_order="released", local_branch=False)  # has no mixer
    with pytest.raises(ConfigError, match="context"):
        ModelConfig(context=76)


# --- in and out ------------------------------------------------------------------------------------------


def test_a_training_starts_from_shorter_weights_and_refuses_longer_ones(store: Store, clip: Path) -> None:
    for source in (str(clip), "clip77"):
        start = start_model(dataclasses.replace(LONG, local_branch=False, pretrained=source), store)
        assert len(start.model.backbone.clip.positional_embedding) == 168
    with pytest.raises(WeightsError, match="reads 168 tokens and this model 77: set its context to 168 or more"):
        start_model(dataclasses.replace(TINY, pretrained="clip168"), store)


def test_a_published_model_is_imported_with_its_own_context_or_a_longer_one(store: Store) -> None:
    assert import_checkpoint("clip168", TINY, store)[0].context == 168
    config, state = import_checkpoint("clip168", dataclasses.replace(TINY, context=248), store)
    assert (config.context, len(state["backbone.clip.positional_embedding"])) == (248, 248)


def test_a_long_clip_file_takes_its_positions_behind_the_kept_ones_from_their_own_tensor(tmp_path: Path) -> None:
    state = dict(CECA(dataclasses.replace(TINY, context=248)).backbone.clip.state_dict())
    state["positional_embedding_res"] = torch.full_like(state["positional_embedding"], 7.0)
    torch.save(state, tmp_path / "longclip.pt")
    config, found = import_checkpoint(str(tmp_path / "longclip.pt"), dataclasses.replace(TINY, context=248))
    positions = found["backbone.clip.positional_embedding"]
    assert config.context == 248
    assert torch.equal(positions[:20], state["positional_embedding"][:20])
    assert (positions[20:] == 7).all()


def test_open_clip_and_openai_files_hold_the_context_and_other_formats_refuse_it(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_weights(store.uri, tmp_path / "clip.safetensors", model="clip168")
    printed = " ".join(capsys.readouterr().err.split())
    assert "force_context_length=168)" in printed
    assert "holds positions of 168 tokens" in printed
    assert len(safetensors.torch.load_file(tmp_path / "clip.safetensors")["positional_embedding"]) == 168
    export_weights(store.uri, tmp_path / "clip.pt", model="clip168", format="openai")
    assert torch.load(tmp_path / "clip.pt", weights_only=True)["context_length"] == 168
    with pytest.raises(UserError, match="the format irra cannot hold a context of 168"):
        export_weights(store.uri, tmp_path / "irra.pth", model="clip168", format="irra")
    with pytest.raises(WeightsError, match="reads 168 tokens and this model 77"):
        import_checkpoint(str(tmp_path / "clip.pt"), TINY)


def test_a_pushed_model_tells_open_clip_and_people_its_context(store: Store, tmp_path: Path) -> None:
    push("clip168", data=store.uri, folder=tmp_path / "pushed")
    described = json.loads((tmp_path / "pushed/open_clip_config.json").read_text())
    assert described["model_cfg"]["text_cfg"]["context_length"] == 168
    assert "texts of up to 168 tokens" in (tmp_path / "pushed/README.md").read_text()
    loaded = ceca.load(str(tmp_path / "pushed"))
    one, other = loaded.embed_queries(ENDS)[0]
    assert abs(one - other).max() > 1e-4


def test_a_model_published_before_the_setting_reads_77_tokens(tmp_path: Path) -> None:
    store, model = Store(str(tmp_path)), CECA(TINY)
    weights = serialize(model.state_dict())
    found = publish_model(store, "m", weights, model=TINY, config={}, training={}, made_from={}, version="v")
    del found.config["model"]["context"]
    assert found.context == 77
    assert "texts of up to 77 tokens" in model_card("m", found, [])
    assert find_model(store, "m").context == 77
