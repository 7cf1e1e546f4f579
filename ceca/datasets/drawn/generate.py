"""Draw a whole benchmark and write it in the layout of a published one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ceca.datasets.drawn.attributes import (
    VOCABULARY,
    Attributes,
    differences,
    distinct_people,
    sample_person,
    similar_person,
)
from ceca.datasets.drawn.body import VIEWS, sample_body
from ceca.datasets.drawn.camera import Shot, draw_shot, sample_shot
from ceca.datasets.drawn.captions import describe, describe_at_length
from ceca.datasets.drawn.datasheet import datasheet
from ceca.datasets.drawn.levels import LEVELS, Level, camera_gains, mistaken
from ceca.datasets.drawn.scene import PLACES
from ceca.datasets.layouts import ATTRIBUTES_FILE, LAYOUTS, Layout
from ceca.datasets.records import SPLITS

VERSION = 1  # version of the drawings; raised when the same seed gives other images or captions
DATASHEET = "DATASHEET.md"
_MARK = ".drawing.json"  # arguments of an unfinished drawing, in its folder

# Default shares of the identities. The rest is test; a layout without a val split has no val share.
_TRAIN_SHARE, _VAL_SHARE = 0.7, 0.1

# First element of a spawn key: the independent random streams of one seed.
_PEOPLE, _BODY, _IMAGE, _CAPTIONS, _CAMERAS, _DISTRACTORS, _TRACKLET, _SCENE, _ERRORS = range(9)


@dataclass(frozen=True, slots=True)
class DrawnStatistics:
    """Counts of a drawn dataset.

    Attributes:
        identities: people in each split.
        images: images in each split.
        captions: captions in all splits.
        words_per_caption: mean length of a caption.
        lookalikes: people drawn as a look-alike of an earlier person.
        occluded: images in which something hides a part of the person.
        drawn: images drawn by this call; the others were in the folder already.
    """

    identities: dict[str, int]
    images: dict[str, int]
    captions: int
    words_per_caption: float
    lookalikes: int
    occluded: int
    drawn: int


@dataclass(frozen=True, slots=True)
class _Person:
    """One identity. `number` counts from 0 over all splits."""

    number: int
    split: str
    attributes: Attributes
    lookalike: bool
    distractor: bool = False


@dataclass(frozen=True, slots=True)
class _Drawn:
    """One image: its annotation record, its ground truth, and whether this call drew it."""

    record: dict[str, Any]
    truth: dict[str, Any]
    new: bool


def draw_dataset(
    folder: Path,
    *,
    seed: int = 0,
    identities: int = 360,
    images_per_identity: int = 4,
    layout: str = "cuhk_pedes",
    split_identities: tuple[int, int, int] | None = None,
    level: str = "easy",
    lookalike_share: float | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DrawnStatistics:
    """Draw a synthetic person-retrieval benchmark. The same arguments give the same bytes.

    Images left by an interrupted call are kept. The annotation file is written last.

    Args:
        folder: output folder, created if missing: annotation file, `attributes.json` (ground truth) and `imgs/`.
        seed: seed of all random choices.
        identities: number of different people.
        images_per_identity: number of images of each person; the views take turns.
        layout: "cuhk_pedes", "icfg_pedes" or "rstpreid".
        split_identities: number of people in train, val and test; by default about 70, 10 and 20 %
            (ICFG-PEDES has no val split: 70 and 30 %).
        level: "easy", "medium" or "hard" (`levels.LEVELS`); the two hard ones have a datasheet, and their ground truth
            has cameras, tracklets, and what is wrong in each caption.
        lookalike_share: share of people that differ from an earlier person of their split in only 2 or 3 attributes,
            1 or 2 above the level easy; None takes the level's.
        workers: number of drawing processes; by default one per usable core. It never changes the result.
        progress: called with (images done, images in total) after each person.

    Returns:
        Counts of the dataset in the folder.

    Raises:
        ValueError: an argument is out of range, or the folder holds a dataset drawn with other arguments.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    chosen = LEVELS[level]
    lookalike_share = chosen.lookalike_share if lookalike_share is None else lookalike_share
    published, splits = _check(seed, identities, images_per_identity, layout, split_identities, lookalike_share)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    drawing = {
        "drawn": True, "seed": seed, "version": VERSION, "layout": layout, "identities": list(splits),
        "images_per_identity": images_per_identity, "lookalike_share": lookalike_share,
    }  # fmt: skip
    gains = camera_gains(chosen, _rng(seed, _CAMERAS))
    if level != "easy":  # drawings made before there were levels are easy ones, and stay as they are
        drawing |= {"level": level, "cameras": [list(gain) for gain in gains]}
    folder = Path(folder)
    _mark(folder, drawing)
    people = _draw_people(seed, splits, lookalike_share, chosen)
    draw = partial(
        _draw_identity, folder=folder, seed=seed, layout=layout, images=images_per_identity, level=chosen, gains=gains
    )
    drawn: list[_Drawn] = []
    for images in _in_order(draw, people, workers):
        drawn.extend(images)
        if progress:
            progress(len(drawn), identities * images_per_identity)
    truth = [image.truth for image in drawn]
    _write(folder / ATTRIBUTES_FILE, drawing | {"vocabulary": VOCABULARY, "images": truth})
    if level != "easy":
        lookalikes = sum(person.lookalike for person in people)
        (folder / DATASHEET).write_text(datasheet(drawing, truth, lookalikes))
    _write(folder / published.annotation, [image.record for image in drawn])
    (folder / _MARK).unlink(missing_ok=True)
    return _statistics(people, drawn)


def _check(
    seed: int,
    identities: int,
    images_per_identity: int,
    layout: str,
    split_identities: tuple[int, int, int] | None,
    lookalike_share: float,
) -> tuple[Layout, tuple[int, int, int]]:
    """Check the arguments of `draw_dataset`; return the layout and the number of people in each split."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if not 1 <= identities <= distinct_people():
        raise ValueError(
            f"identities must be between 1 and {distinct_people()} (the number of distinct combinations of "
            f"attributes), not {identities}"
        )
    if images_per_identity < 1:
        raise ValueError(f"images_per_identity must be at least 1, not {images_per_identity}")
    if not 0 <= lookalike_share <= 1:
        raise ValueError(f"lookalike_share must be between 0 and 1, not {lookalike_share}")
    published = LAYOUTS[layout]
    has_val = "val" in published.statistics
    if split_identities is None:
        train = round(identities * _TRAIN_SHARE)
        val = round(identities * _VAL_SHARE) if has_val else 0
        split_identities = (train, val, identities - train - val)
    if len(split_identities) != 3 or min(split_identities) < 0 or sum(split_identities) != identities:
        raise ValueError(f"split_identities {split_identities} must be three counts that add up to {identities}")
    if split_identities[1] and not has_val:
        raise ValueError(f"layout {layout} has no val split; split_identities must be (train, 0, test)")
    return published, split_identities


def _mark(folder: Path, drawing: dict[str, Any]) -> None:
    """Write the drawing's arguments into the folder, so that images of two drawings never mix.

    Raises:
        ValueError: the folder holds a drawing with other arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (_MARK, ATTRIBUTES_FILE):
        if (folder / name).exists():
            earlier = json.loads((folder / name).read_text())
            before, now = ({"level": "easy"} | one for one in (earlier, drawing))
            other = [f"{key} {before.get(key)!r}" for key in now if before.get(key) != now[key]]
            if other:
                raise ValueError(
                    f"{folder} holds a drawn dataset with {', '.join(other)}; delete it or choose another folder"
                )
    _write(folder / _MARK, drawing)


def _rng(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _draw_people(seed: int, splits: tuple[int, int, int], lookalike_share: float, level: Level) -> list[_Person]:
    """Draw the people of all splits, in the order of the splits. No two people have the same attributes."""
    rng = _rng(seed, _PEOPLE)
    taken: set[Attributes] = set()
    people: list[_Person] = []
    for split, count in zip(SPLITS, splits, strict=True):
        group: list[_Person] = []
        while len(group) < count:
            lookalike = bool(group) and bool(rng.random() < lookalike_share)
            if lookalike:
                model = group[int(rng.integers(len(group)))].attributes
                attributes = similar_person(rng, model, int(rng.integers(level.changes[0], level.changes[1] + 1)))
            else:
                attributes = sample_person(rng)
            if attributes not in taken:
                taken.add(attributes)
                group.append(_Person(len(people) + len(group), split, attributes, lookalike))
        people += group
    test = [person.number for person in people if person.split == "test"]
    silent = _rng(seed, _DISTRACTORS).choice(test, round(level.distractors * len(test)), replace=False) if test else ()
    return [replace(person, distractor=person.number in silent) for person in people]


def _in_order(
    draw: Callable[[_Person], list[_Drawn]], people: list[_Person], workers: int | None
) -> Iterator[list[_Drawn]]:
    """Yield the results of `draw` in the order of the people."""
    if workers is None:  # few people are drawn faster than a pool starts
        workers = len(os.sched_getaffinity(0)) if len(people) >= 16 else 1
    if workers == 1:
        yield from map(draw, people)
        return
    # Spawn: a process with running threads (Ray, torch) must not be forked.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(draw, people, chunksize=max(1, min(8, len(people) // (workers * 4))))


def _draw_identity(
    person: _Person,
    *,
    folder: Path,
    seed: int,
    layout: str,
    images: int,
    level: Level,
    gains: list[tuple[float, float, float]],
) -> list[_Drawn]:
    """Draw all images of one person. Files that exist already are kept."""
    rng = _rng(seed, _BODY, person.number)
    body, views = sample_body(rng), rng.permutation(VIEWS)
    published = LAYOUTS[layout]
    number = person.number + published.first_identity
    order = _rng(seed, _CAMERAS, person.number).permutation(level.cameras)  # cameras that the person passes
    drawn = []
    for index in range(images):
        rng = _rng(seed, _IMAGE, person.number, index)
        tracklet, frame = divmod(index, level.frames)
        view, scene, seen = str(views[tracklet % len(views)]), None, {}
        if level.cameras:
            camera = int(order[tracklet % level.cameras])
            name = f"{number:05d}_c{camera + 1}_t{tracklet}_{frame:02d}"
            settings = _rng(seed, _TRACKLET, person.number, tracklet)
            shot = replace(sample_shot(view, settings, PLACES[camera % len(PLACES)]), gain=gains[camera])
            scene = _rng(seed, _SCENE, person.number, tracklet)
            seen = {"camera": str(camera + 1), "tracklet": f"{number:05d}-{tracklet}", "distractor": person.distractor}
        else:
            name, shot = f"{number:05d}_{index:02d}", sample_shot(view, rng)
        path = f"drawn/{person.split}/{name}.jpg"
        target = folder / "imgs" / path
        new = not target.exists()
        if new:
            _save(draw_shot(person.attributes, body, shot, rng, scene), target, shot.quality)
        words = _rng(seed, _CAPTIONS, person.number, index)
        errors = _rng(seed, _ERRORS, person.number, index)
        said = [] if person.distractor else range(published.captions_per_image)
        told = [_caption(person.attributes, shot, level, words, errors) for _ in said]
        captions = [text for text, _ in told]
        record = {"id": number, "split": person.split, "captions": captions, published.image_key: path}
        truth = {
            "path": path, "id": number, "view": shot.view, "lighting": shot.lighting,
            "occluded": shot.occluder is not None, "attributes": asdict(person.attributes),
        }  # fmt: skip
        if seen:
            truth |= seen | {"captions": [known for _, known in told]}
        drawn.append(_Drawn(record, truth, new))
    return drawn


def _caption(
    person: Attributes, shot: Shot, level: Level, words: np.random.Generator, errors: np.random.Generator
) -> tuple[str, dict[str, Any]]:
    """A caption, and what is known of it: its wrong attributes, and whether it is long."""
    taken_for = mistaken(person, level.wrong, errors)
    long = bool(errors.random() < level.long)
    if long:
        text = describe_at_length(taken_for, shot.view, shot.place, shot.lighting, words)
    else:
        text = describe(taken_for, shot.view, words, 1 - level.missing)
    return text, {"wrong": list(differences(taken_for, person)), "long": long}


def _save(image: Image.Image, target: Path, quality: int) -> None:
    """Write a JPEG file atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    image.save(unfinished, format="JPEG", quality=quality)
    os.replace(unfinished, target)


def _write(target: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(unfinished, target)


def _statistics(people: list[_Person], drawn: list[_Drawn]) -> DrawnStatistics:
    captions = [caption for image in drawn for caption in image.record["captions"]]
    return DrawnStatistics(
        identities={split: sum(person.split == split for person in people) for split in SPLITS},
        images={split: sum(image.record["split"] == split for image in drawn) for split in SPLITS},
        captions=len(captions),
        words_per_caption=sum(len(caption.split()) for caption in captions) / len(captions),
        lookalikes=sum(person.lookalike for person in people),
        occluded=sum(image.truth["occluded"] for image in drawn),
        drawn=sum(image.new for image in drawn),
    )
