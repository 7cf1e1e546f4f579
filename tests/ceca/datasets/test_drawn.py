"""Drawn pedestrians: reproducible datasets in published layouts, correct captions and visible attributes."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ceca.datasets.drawn import VOCABULARY, Attributes, contact_sheet, describe, draw_dataset
from ceca.datasets.drawn.attributes import differences, distinct_people, sample_person, similar_person
from ceca.datasets.drawn.body import VIEWS, Body, Pose
from ceca.datasets.drawn.camera import OCCLUDERS, hide
from ceca.datasets.drawn.canvas import Canvas
from ceca.datasets.drawn.captions import COLOUR_WORDS, HAIR_WORDS, NOUNS, PATTERN_WORDS
from ceca.datasets.drawn.figure import draw_figure
from ceca.datasets.drawn.paint import CLOTH_COLOURS

# Written out here and not taken from the code: real datasets have these names.
ANNOTATIONS = {"cuhk_pedes": "reid_raw.json", "icfg_pedes": "ICFG-PEDES.json", "rstpreid": "data_captions.json"}
IMAGE_KEYS = {"cuhk_pedes": "file_path", "icfg_pedes": "file_path", "rstpreid": "img_path"}

PLAIN = Attributes(
    gender="woman",
    hair_length="short",
    hair_colour="black",
    hat="none",
    hat_colour="none",
    upper_kind="shirt",
    upper_colour="red",
    upper_pattern="plain",
    lower_kind="trousers",
    lower_colour="black",
    lower_pattern="plain",
    shoes_kind="trainers",
    shoes_colour="white",
    carried="none",
    carried_colour="none",
)

people = st.integers(0, 2**32).map(lambda seed: sample_person(np.random.default_rng(seed)))
rngs = st.integers(0, 2**32).map(np.random.default_rng)
views = st.sampled_from(VIEWS)


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of each file by its path below the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of 20 people with two images each. Tests must not change it."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder, seed=3, identities=20, images_per_identity=2, workers=1)
    return folder


# --- the dataset -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(drawn: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path, seed=3, identities=20, images_per_identity=2, workers=2)
    assert content(tmp_path) == content(drawn)


def test_another_seed_gives_other_people_and_other_images(drawn: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path, seed=4, identities=20, images_per_identity=2, workers=1)
    one, other = content(drawn), content(tmp_path)
    assert one.keys() == other.keys()
    assert not [name for name in one if one[name] == other[name]]


def test_an_interrupted_drawing_is_completed_to_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(drawn, folder)
    (folder / "reid_raw.json").unlink()
    for image in sorted((folder / "imgs").rglob("*.jpg"))[5:12]:
        image.unlink()
    statistics = draw_dataset(folder, seed=3, identities=20, images_per_identity=2, workers=1)
    assert statistics.drawn == 7
    assert content(folder) == content(drawn)


def test_a_killed_drawing_leaves_no_annotations_and_resumes_only_with_the_same_arguments(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    arguments = {"identities": 4, "images_per_identity": 1, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path, seed=1, progress=stop, **arguments)
    assert not (tmp_path / "reid_raw.json").exists()
    with pytest.raises(ValueError, match="seed 1"):
        draw_dataset(tmp_path, seed=2, **arguments)
    assert draw_dataset(tmp_path, seed=1, **arguments).drawn == 3


@pytest.mark.parametrize("layout", ["cuhk_pedes", "icfg_pedes", "rstpreid"])
def test_layouts_are_as_published(layout: str, tmp_path: Path) -> None:
    statistics = draw_dataset(tmp_path, identities=10, images_per_identity=1, layout=layout, workers=1)
    key = IMAGE_KEYS[layout]
    assert {p.name for p in tmp_path.iterdir()} == {"imgs", "attributes.json", ANNOTATIONS[layout]}
    records = json.loads((tmp_path / ANNOTATIONS[layout]).read_text())
    assert [set(record) for record in records] == [{"id", "split", "captions", key}] * 10
    assert {len(record["captions"]) for record in records} == {1 if layout == "icfg_pedes" else 2}
    first = 1 if layout == "cuhk_pedes" else 0
    assert sorted({record["id"] for record in records}) == list(range(first, first + 10))
    splits = {"train": 7, "val": 0, "test": 3} if layout == "icfg_pedes" else {"train": 7, "val": 1, "test": 2}
    assert statistics.identities == splits
    on_disk = {str(p.relative_to(tmp_path / "imgs")) for p in (tmp_path / "imgs").rglob("*.jpg")}
    assert {record[key] for record in records} == on_disk
    for record in records:
        with Image.open(tmp_path / "imgs" / record[key]) as image:
            assert image.format == "JPEG"
            assert 110 <= image.width <= 145
            assert 1.8 < image.height / image.width < 2.2


def test_a_person_belongs_to_one_split_and_is_unique(drawn: Path) -> None:
    records = json.loads((drawn / "reid_raw.json").read_text())
    split_of = {(record["id"], record["split"]) for record in records}
    assert len(split_of) == 20
    images = json.loads((drawn / "attributes.json").read_text())["images"]
    assert len({tuple(image["attributes"].values()) for image in images}) == 20


def test_the_ground_truth_is_stored_beside_the_annotations(drawn: Path) -> None:
    records = json.loads((drawn / "reid_raw.json").read_text())
    truth = json.loads((drawn / "attributes.json").read_text())
    assert truth["drawn"] is True
    assert truth["seed"] == 3
    assert truth["vocabulary"] == {name: list(values) for name, values in VOCABULARY.items()}
    assert [image["path"] for image in truth["images"]] == [record["file_path"] for record in records]
    for image in truth["images"]:
        assert {"path", "id", "view", "lighting", "occluded", "attributes"} == set(image)
        Attributes(**image["attributes"])


def test_the_size_of_each_split_can_be_set(tmp_path: Path) -> None:
    statistics = draw_dataset(tmp_path, identities=5, images_per_identity=1, split_identities=(2, 2, 1), workers=1)
    assert statistics.images == {"train": 2, "val": 2, "test": 1}
    assert statistics.captions == 10


def test_progress_counts_every_image(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    draw_dataset(tmp_path, identities=3, images_per_identity=2, workers=1, progress=lambda *step: steps.append(step))
    assert steps == [(2, 6), (4, 6), (6, 6)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "market1501"}, "cuhk_pedes, icfg_pedes, rstpreid"),
        ({"identities": distinct_people() + 1}, "distinct combinations"),
        ({"identities": 0}, "identities must be"),
        ({"images_per_identity": 0}, "images_per_identity"),
        ({"lookalike_share": 1.5}, "lookalike_share"),
        ({"seed": -1}, "seed"),
        ({"workers": 0}, "workers"),
        ({"identities": 5, "split_identities": (5, 1, 0)}, "add up to 5"),
        ({"identities": 5, "layout": "icfg_pedes", "split_identities": (3, 1, 1)}, "no val split"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_written(
    arguments: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_dataset(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


# --- people ----------------------------------------------------------------------------------------------


@given(people)
def test_people_have_values_of_the_vocabulary_that_go_together(person: Attributes) -> None:
    assert all(value in VOCABULARY[name] for name, value in asdict(person).items())
    assert (person.hat == "none") == (person.hat_colour == "none")
    assert (person.carried == "none") == (person.carried_colour == "none")
    assert (person.upper_kind == "dress") == (person.lower_kind == "none") == (person.lower_colour == "none")


def test_incoherent_people_are_refused() -> None:
    with pytest.raises(ValueError, match="hat_colour"):
        replace(PLAIN, hat_colour="red")


@given(people, rngs, st.integers(2, 3))
def test_lookalikes_differ_in_exactly_the_requested_number_of_attributes(
    person: Attributes, rng: np.random.Generator, changes: int
) -> None:
    other = similar_person(rng, person, changes)
    assert other.gender == person.gender
    assert len(differences(person, other)) == changes


def test_the_share_of_lookalikes_can_be_set(tmp_path: Path) -> None:
    sizes = {"identities": 12, "images_per_identity": 1, "split_identities": (12, 0, 0), "workers": 1}
    assert draw_dataset(tmp_path / "none", lookalike_share=0, **sizes).lookalikes == 0
    assert draw_dataset(tmp_path / "all", lookalike_share=1, **sizes).lookalikes == 11


# --- captions --------------------------------------------------------------------------------------------


@given(people, views, rngs)
@settings(max_examples=300)
def test_captions_are_short_english_sentences(person: Attributes, view: str, rng: np.random.Generator) -> None:
    caption = describe(person, view, rng)
    assert re.fullmatch(r"[A-Z][A-Za-z ,.-]+\.", caption)
    assert 4 <= len(caption.split()) <= 60
    assert not re.search(r"  | [.,]|,,|\.\.|\. [a-z]|\ba [aeio]|\ban [^aeiou]|[Tt]hey (is|has|wears)\b", caption)


def colours_of_things(caption: str) -> list[tuple[str, str]]:
    """Pairs (colour, noun directly after it) of a caption; every colour in it must have such a noun."""
    colours = {word: c for c in CLOTH_COLOURS for word in COLOUR_WORDS.get(c, (c,))}
    colours |= {word: c for c, words in HAIR_WORDS.items() for word in words} | {"gray": "grey"}
    nouns = [noun for words in NOUNS.values() for noun in words] + ["hair"]
    patterns = [word for words in PATTERN_WORDS.values() for word in words]

    def any_of(words: list[str]) -> str:
        return "|".join(sorted(map(re.escape, words), key=len, reverse=True))

    named = re.compile(rf"\b({any_of(list(colours))}) (?:(?:{any_of(patterns)}) )?({any_of(nouns)})\b", re.I)
    pairs = [(colours[colour.lower()], noun) for colour, noun in named.findall(caption)]
    assert len(pairs) == len(re.findall(rf"\b(?:{any_of(list(colours))})\b", caption, re.I)), caption
    return pairs


@given(people, views, rngs)
@settings(max_examples=300)
def test_captions_never_name_a_wrong_colour(person: Attributes, view: str, rng: np.random.Generator) -> None:
    true = {("hair", person.hair_colour)}
    for kind, colour in (
        (person.upper_kind, person.upper_colour),
        (person.lower_kind, person.lower_colour),
        (person.shoes_kind, person.shoes_colour),
        (person.hat, person.hat_colour),
        (person.carried, person.carried_colour),
    ):
        true |= {(noun, colour) for noun in NOUNS.get(kind, ())}
    for colour, noun in colours_of_things(describe(person, view, rng)):
        assert (noun, colour) in true


@given(people, views, rngs)
@settings(max_examples=200)
def test_captions_name_no_other_gender_and_no_missing_thing(
    person: Attributes, view: str, rng: np.random.Generator
) -> None:
    words = set(re.findall(r"[a-z]+", describe(person, view, rng).lower()))
    other = {"man": {"woman", "lady", "she", "her"}, "woman": {"man", "guy", "gentleman", "he", "his"}}
    assert not words & other[person.gender]
    if person.carried == "none":
        assert not words & {"carrying", "holding", "pulling", "wheeling"}
    if view != "front" or person.upper_pattern != "logo":
        assert "logo" not in words


def test_captions_vary_and_leave_things_out() -> None:
    person = replace(PLAIN, hat="cap", hat_colour="green", carried="backpack", carried_colour="blue")
    rng = np.random.default_rng(0)
    captions = [describe(person, "front", rng) for _ in range(400)]
    assert len(set(captions)) > 380

    def share(*words: str) -> float:
        return float(np.mean([any(word in caption for word in words) for caption in captions]))

    assert share("trousers", "pants") > 0.9
    assert share("shirt") > 0.9
    assert share("woman", "lady", "female", "Woman") > 0.85
    for words in (("trainers", "sneakers", "shoes"), ("hair",), ("cap",), ("backpack", "rucksack")):
        assert 0.35 < share(*words) < 0.9, words
    assert 15 < np.mean([len(caption.split()) for caption in captions]) < 40


# --- pictures --------------------------------------------------------------------------------------------


def figure(person: Attributes, view: str = "front") -> np.ndarray:
    """Picture of a person on grey, 5 pixels per figure unit, the crown in row 20: uint8 [540, 300, 3]."""
    image = Image.new("RGB", (300, 540), (128, 128, 128))
    canvas = Canvas(image, 5.0, 150.0, 20.0, mirrored=view == "left")
    draw_figure(canvas, person, Body((234, 190, 158), 1.0), Pose(view, 0.5))
    return np.asarray(image)


def region(picture: np.ndarray, rows: tuple[int, int]) -> np.ndarray:
    """Mean colour on the body's axis between two rows of the figure: [3]."""
    return picture[20 + rows[0] * 5 : 20 + rows[1] * 5, 135:166].reshape(-1, 3).mean(axis=0)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("colour", ["red", "blue", "green", "yellow", "purple"])
def test_the_colour_of_a_garment_is_visible_from_every_side(colour: str, view: str) -> None:
    seen = region(figure(replace(PLAIN, upper_colour=colour, carried="none"), view), (24, 46))
    nearest = min(CLOTH_COLOURS, key=lambda name: float(np.abs(seen - CLOTH_COLOURS[name]).sum()))
    assert nearest == colour


def test_colours_can_be_distinguished_in_finished_images(tmp_path: Path) -> None:
    draw_dataset(tmp_path, identities=40, images_per_identity=1, lookalike_share=0, workers=1)
    means: dict[str, list[np.ndarray]] = {"red": [], "blue": [], "green": []}
    for image in json.loads((tmp_path / "attributes.json").read_text())["images"]:
        colour = image["attributes"]["upper_colour"]
        if colour in means and image["attributes"]["upper_pattern"] == "plain":
            with Image.open(tmp_path / "imgs" / image["path"]) as opened:
                small = np.asarray(opened.resize((64, 128)), float)
            means[colour].append(small[36:58, 27:38].reshape(-1, 3).mean(axis=0))
    strongest = {"red": 0, "green": 1, "blue": 2}
    judged = [
        np.argmax(mean - np.mean(mean)) == strongest[colour] for colour, values in means.items() for mean in values
    ]
    assert len(judged) >= 3
    assert np.mean(judged) >= 0.75  # the others are hidden by a pole or a backpack strap


@pytest.mark.parametrize(
    "change",
    [
        {"upper_kind": "hoodie"},
        {"upper_pattern": "striped"},
        {"upper_kind": "long coat"},
        {"lower_kind": "skirt"},
        {"lower_kind": "shorts"},
        {"lower_pattern": "camouflage"},
        {"shoes_kind": "boots"},
        {"hair_length": "long"},
        {"hair_colour": "blond"},
        {"hat": "sun hat", "hat_colour": "yellow"},
        {"carried": "suitcase", "carried_colour": "red"},
        {"carried": "backpack", "carried_colour": "blue"},
    ],
    ids=lambda change: " ".join(change.values()),
)
@pytest.mark.parametrize("view", VIEWS)
def test_every_kind_of_difference_is_visible(change: dict[str, str], view: str) -> None:
    before, after = figure(PLAIN, view), figure(replace(PLAIN, **change), view)
    changed = (np.abs(before.astype(int) - after).sum(axis=2) > 60).sum()
    assert changed > 250  # the person has about 35,000 pixels


def test_the_four_views_are_different_pictures() -> None:
    pictures = [figure(PLAIN, view) for view in VIEWS]
    for number, one in enumerate(pictures):
        for other in pictures[number + 1 :]:
            assert (np.abs(one.astype(int) - other).sum(axis=2) > 60).sum() > 2000 or one is other


@given(st.sampled_from(OCCLUDERS), rngs)
@settings(max_examples=60, deadline=None)
def test_an_occluder_hides_at_most_a_quarter_of_the_image(occluder: str, rng: np.random.Generator) -> None:
    image = Image.new("RGB", (256, 512), (255, 0, 255))
    hide(image, occluder, rng)
    hidden = (np.asarray(image) != (255, 0, 255)).any(axis=2).mean()
    assert 0.01 < hidden <= 0.25


# --- the sheet -------------------------------------------------------------------------------------------


def test_a_contact_sheet_shows_different_people_with_their_captions(drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    contact_sheet(drawn, out, rows=2, columns=5)
    with Image.open(out) as sheet:
        assert sheet.width > 5 * 128
        assert sheet.height > 2 * 256


def test_a_contact_sheet_needs_a_dataset_with_enough_people(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="20"):
        contact_sheet(drawn, tmp_path / "sheet.png", rows=5, columns=5)
    with pytest.raises(ValueError, match=r"reid_raw\.json"):
        contact_sheet(tmp_path, tmp_path / "sheet.png", rows=1, columns=1)
