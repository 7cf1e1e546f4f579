"""Levels of a drawn benchmark: each property that makes it hard is there at the rate that the level says."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ceca.datasets.drawn import Attributes, contact_sheet, describe, draw_dataset
from ceca.datasets.drawn.attributes import differences, sample_person
from ceca.datasets.drawn.body import VIEWS
from ceca.datasets.drawn.camera import LIGHTINGS
from ceca.datasets.drawn.captions import describe_at_length
from ceca.datasets.drawn.levels import LEVELS, camera_gains, may_be_wrong, mistaken
from ceca.datasets.drawn.scene import PLACES
from ceca.datasets.layouts import read_annotations
from ceca.model.tokens import CONTEXT, count_tokens
from tests.ceca.datasets.test_drawn import content

SIZES = {"seed": 3, "identities": 24, "split_identities": (10, 4, 10), "images_per_identity": 4, "layout": "rstpreid"}
HARD = LEVELS["hard"]


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hard")
    draw_dataset(folder, level="hard", workers=1, **SIZES)
    return folder


@pytest.fixture(scope="module")
def truth(hard: Path) -> dict[str, Any]:
    return json.loads((hard / "attributes.json").read_text())


@pytest.fixture(scope="module")
def records(hard: Path) -> list[dict[str, Any]]:
    return json.loads((hard / "data_captions.json").read_text())


def within(count: int, trials: int, rate: float) -> bool:
    """Whether a count lies within four deviations of a binomial's mean."""
    return abs(count - trials * rate) <= 4 * math.sqrt(trials * rate * (1 - rate))


# --- the same bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "digest"),
    [
        ("cuhk_pedes", "e604b7e0fd4c333fc07930b2e8c2491ff63005821c3add7ca0ad5ace66d8d78d"),
        ("rstpreid", "ab6e31c3edb180140ff1dff142e0b39149fdc1546af0accd5a480859d4c72753"),
    ],
)
def test_without_a_level_a_drawing_is_what_it_was_before_there_were_levels(
    layout: str, digest: str, tmp_path: Path
) -> None:
    draw_dataset(tmp_path, seed=5, identities=4, images_per_identity=2, layout=layout, workers=1)
    found = hashlib.sha256()
    for name, written in content(tmp_path).items():
        found.update(name.encode() + written)
    assert found.hexdigest() == digest


def test_a_level_gives_the_same_bytes_again_also_after_an_interruption(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    sizes = {"seed": 2, "identities": 4, "images_per_identity": 2, "level": "hard", "workers": 1}
    draw_dataset(tmp_path / "whole", **sizes)
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path / "stopped", progress=stop, **sizes)
    assert draw_dataset(tmp_path / "stopped", **sizes).drawn == 4
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_levels_do_not_mix_in_a_folder_and_unknown_ones_are_refused(hard: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="level 'hard'"):
        draw_dataset(hard, lookalike_share=HARD.lookalike_share, workers=1, **SIZES)
    with pytest.raises(ValueError, match="choose one of easy, medium, hard"):
        draw_dataset(tmp_path, level="brutal")


# --- people ----------------------------------------------------------------------------------------------


def test_lookalikes_share_all_but_one_or_two_attributes_with_somebody_of_their_split(truth: dict[str, Any]) -> None:
    by_split: dict[str, dict[int, Attributes]] = defaultdict(dict)
    for image in truth["images"]:
        by_split[image["path"].split("/")[1]][image["id"]] = Attributes(**image["attributes"])
    alike = people = 0
    for group in by_split.values():
        for number, person in group.items():
            people += 1
            earlier = [other for other_number, other in group.items() if other_number < number]
            alike += any(len(differences(person, other)) in (1, 2) for other in earlier)
        assert len(set(group.values())) == len(group)
    assert within(alike, people - len(by_split), HARD.lookalike_share)  # the first of a split has nobody to resemble
    assert alike > 0.5 * people


def test_distractors_are_in_the_gallery_of_test_and_have_no_query(
    truth: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    silent = {image["id"] for image in truth["images"] if image["distractor"]}
    assert len(silent) == 4  # 0.4 of 10 people
    for record in records:
        assert bool(record["captions"]) == (record["id"] not in silent)
        assert record["split"] == "test" or record["id"] not in silent


def test_the_reader_of_the_layout_finds_people_captions_cameras_and_distractors(
    hard: Path, records: list[dict[str, Any]], truth: dict[str, Any]
) -> None:
    read = read_annotations(str(hard))
    assert (read.layout.name, read.rejects, len(read.records)) == ("rstpreid", (), 96)
    for record, image in zip(read.records, truth["images"], strict=True):
        assert (record.source_path, record.camera) == (image["path"], image["camera"])
        assert len(record.captions) in (1, 2) or image["distractor"]


# --- cameras ---------------------------------------------------------------------------------------------


def test_frames_of_a_tracklet_share_camera_view_and_light_and_a_person_has_one_tracklet_a_camera(
    truth: dict[str, Any],
) -> None:
    tracklets = defaultdict(list)
    for image in truth["images"]:
        tracklets[image["tracklet"]].append(image)
    assert len(tracklets) == 48
    for frames in tracklets.values():
        assert len(frames) == HARD.frames == 2
        assert len({(image["id"], image["camera"], image["view"], image["lighting"]) for image in frames}) == 1
    cameras = defaultdict(list)
    for frames in tracklets.values():
        cameras[frames[0]["id"]].append(frames[0]["camera"])
    assert all(len(set(seen)) == len(seen) == 2 for seen in cameras.values())
    assert {camera for seen in cameras.values() for camera in seen} == set("123456")


def test_cameras_differ_in_light_as_their_gains_say(hard: Path, truth: dict[str, Any]) -> None:
    gains = np.array(truth["cameras"])
    assert gains.shape == (6, 3)
    assert gains[:, 1].max() / gains[:, 1].min() == pytest.approx(math.exp(2 * HARD.light))
    tints = defaultdict(list)
    for image in truth["images"]:
        with Image.open(hard / "imgs" / image["path"]) as opened:
            red, _, blue = np.asarray(opened, float).reshape(-1, 3).mean(axis=0)
        tints[int(image["camera"])].append(math.log(red / blue))
    seen = [np.mean(tints[camera]) for camera in range(1, 7)]
    assert np.corrcoef(seen, np.log(gains[:, 0] / gains[:, 2]))[0, 1] > 0.8


@given(st.sampled_from(["medium", "hard"]), st.integers(0, 2**32))
@settings(max_examples=20)
def test_exposures_are_spread_evenly_and_casts_stay_in_their_range(level: str, seed: int) -> None:
    chosen = LEVELS[level]
    gains = np.log(camera_gains(chosen, np.random.default_rng(seed)))
    assert sorted(gains[:, 1]) == pytest.approx(np.linspace(-chosen.light, chosen.light, chosen.cameras))
    assert abs(gains - gains[:, 1:2]).max() <= chosen.light / 2 + 1e-9


# --- captions --------------------------------------------------------------------------------------------


def test_captions_have_errors_and_are_long_at_the_rates_of_the_level(
    truth: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    captions = wrong = attributes = long = 0
    for image, record in zip(truth["images"], records, strict=True):
        for known, text in zip(image["captions"], record["captions"], strict=True):
            captions += 1
            wrong += len(known["wrong"])
            attributes += may_be_wrong(Attributes(**image["attributes"]))
            long += known["long"]
            assert (count_tokens(text) > CONTEXT) == known["long"]
    assert captions == 160
    assert within(wrong, attributes, HARD.wrong)
    assert within(long, captions, HARD.long)


def test_a_wrong_attribute_has_another_value_at_the_given_rate() -> None:
    rng = np.random.default_rng(0)
    wrong = total = 0
    for _ in range(300):
        person = sample_person(rng)
        taken_for = mistaken(person, 0.1, rng)
        wrong += len(differences(person, taken_for))
        total += may_be_wrong(person)
        assert taken_for.gender == person.gender
    assert within(wrong, total, 0.1)
    assert mistaken(person, 0, rng) is person


def test_harder_captions_leave_more_out() -> None:
    person = sample_person(np.random.default_rng(1))
    means = []
    for level in ("easy", "medium", "hard"):
        rng = np.random.default_rng(0)
        texts = [describe(person, "front", rng, 1 - LEVELS[level].missing) for _ in range(300)]
        means.append(np.mean([len(text.split()) for text in texts]))
    assert means[0] > means[1] + 1 > means[2] + 2


@given(st.integers(0, 2**32), st.sampled_from(VIEWS), st.sampled_from(PLACES), st.sampled_from(LIGHTINGS))
@settings(max_examples=60, deadline=None)
def test_long_captions_have_more_than_77_tokens_and_fewer_than_168(
    seed: int, view: str, place: str, lighting: str
) -> None:
    rng = np.random.default_rng(seed)
    text = describe_at_length(sample_person(rng), view, place, lighting, rng)
    assert CONTEXT < count_tokens(text) < 168
    assert text.count(". ") == 7
    assert "  " not in text


# --- what goes with it -----------------------------------------------------------------------------------


def test_the_datasheet_counts_what_is_there(hard: Path, truth: dict[str, Any]) -> None:
    sheet = (hard / "DATASHEET.md").read_text()
    known = list(itertools.chain.from_iterable(image["captions"] for image in truth["images"]))
    for line in (
        "# Drawn pedestrians, level hard, seed 3",
        "| people in train, val, test | 10, 4, 10 |",
        "| tracklets | 48 |",
        "| people of test without a query | 4 |",
        f"| captions at length (above 77 tokens) | {sum(one['long'] for one in known)} of 160 |",
        f"| captions with a wrong attribute (rate 0.08 each) | {sum(bool(one['wrong']) for one in known)} of 160 |",
    ):
        assert line in sheet


def test_a_contact_sheet_leaves_people_without_a_caption_out(hard: Path, tmp_path: Path) -> None:
    contact_sheet(hard, tmp_path / "sheet.png", rows=2, columns=2)
    with pytest.raises(ValueError, match="has 20"):
        contact_sheet(hard, tmp_path / "sheet.png", rows=7, columns=3)
