"""A dataset of any number of images, made in minutes: the schema, parts and row groups of a real one.

    from benchmarks.made import make_dataset

    store = make_dataset("/data/million", 1_000_000)

Every image shows the same tiny picture. Captions are drawn people's and dialogues the simulated annotator's, mixed by
sentences, so that nearly all differ. Embeddings are random unit vectors. The model `random` is tiny, with random
weights.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ceca.config import DialogueConfig, IndexConfig, IngestConfig, ModelConfig, OracleConfig
from ceca.data import schema
from ceca.data.store import Receipt, Store
from ceca.datasets.drawn.attributes import VOCABULARY, sample_person
from ceca.datasets.drawn.captions import describe
from ceca.dialogue.conversation import PROMPT_VERSION, QUESTIONS, Subject, converse
from ceca.dialogue.oracle import OracleEngine

TINY = ModelConfig(backbone="ceca-tiny", image_height=128, image_width=64, mixer_heads=4, local_dim=256)
WIDTHS = 512, 1024  # of the embeddings, as of ViT-B/16
PEOPLE = 1024  # whose captions and dialogues are mixed
IMAGES_OF_ONE, CAPTIONS_OF_ONE = 4, 2
VIEWS = "front", "back", "left", "right"
WRITERS = 2  # parts written at the same time
VERSION = "made"

Make = Callable[["Made", int, int], pa.Table]  # (…, first image, number of images) → rows of a part


def make_dataset(
    uri: str, images: int, *, widths: tuple[int, int] | None = WIDTHS, model: bool = True, seed: int = 0
) -> Store:
    """Publish the tables images, captions, dialogues and gallery of N images, all of the split test.

    Args:
        uri: where the dataset is made. One that is there already is returned as it is.
        images: number of images N.
        widths: numbers in the global and the local embedding of the table gallery, in fp16; None makes no gallery.
        model: publish the tiny model; it needs torch. The gallery's embeddings have other widths than its.
        seed: of all random choices.
    """
    store = Store(uri)
    if store.manifest("gallery" if widths else "dialogues") is None:
        digest = _publish_model(store) if model else VERSION
        made = Made.of_people(seed, digest, widths or WIDTHS)
        ingest, dialogue, index = IngestConfig(), DialogueConfig(), IndexConfig()
        publish = functools.partial(_publish, store, made, images)
        publish("ingest", {}, ingest.images_per_part, {"captions": Made.captions, "images": Made.images})
        publish("dialogue", {"images": VERSION}, dialogue.images_per_part, {"dialogues": Made.dialogues})
        if widths:
            sources = {"images": VERSION, "dialogues": VERSION, "model": digest}
            publish("index", sources, index.images_per_part, {"gallery": Made.gallery})
    return store


@dataclasses.dataclass(frozen=True)
class Made:
    """Makes rows of the tables for any range of images; what they are mixed from.

    Attributes:
        seed: of all random choices.
        digest: of the model that the gallery names.
        widths: of the gallery's embeddings.
        picture: the encoded image.
        told: captions.
        begun: first sentences of summaries; `ended`: the others.
        answers: of each question.
    """

    seed: int
    digest: str
    widths: tuple[int, int]
    picture: bytes
    told: pa.Array
    begun: pa.Array
    ended: pa.Array
    answers: list[pa.Array]

    @classmethod
    def of_people(cls, seed: int, digest: str, widths: tuple[int, int]) -> Made:
        """Draw people's attributes, write their captions and ask the simulated annotator about them."""
        random = np.random.default_rng(seed)
        people = [sample_person(random) for _ in range(PEOPLE)]
        told = [describe(person, VIEWS[n % len(VIEWS)], random) for n, person in enumerate(people)]
        engine = OracleEngine(OracleConfig(seed=seed), VOCABULARY)
        limits = {"questions": len(QUESTIONS), "answer_tokens": 1000, "summary_tokens": 1000}

        async def ask() -> list[tuple[str, list[str]]]:
            subjects = (Subject(str(n), b"", dataclasses.asdict(one), VIEWS[n % 4]) for n, one in enumerate(people))
            dialogues = [await converse(engine, subject, **limits) for subject in subjects]
            return [(one.summary, [turn.answer for turn in one.turns]) for one in dialogues]

        dialogues = asyncio.run(ask())
        halves = [re.split(r"(?<=[.,]) ", f"{summary} ", maxsplit=1) for summary, _ in dialogues]
        content = io.BytesIO()
        Image.new("RGB", (16, 48), "grey").save(content, "JPEG")
        return cls(
            seed,
            digest,
            widths,
            content.getvalue(),
            told=pa.array(told),
            begun=pa.array([half[0] for half in halves]),
            ended=pa.array([half[1].strip() for half in halves]),
            answers=[pa.array(answers) for answers in zip(*(answers for _, answers in dialogues), strict=True)],
        )

    def images(self, start: int, count: int) -> pa.Table:
        paths = [_path(number) for number in range(start, start + count)]
        columns = {
            **_named(start, count),
            "camera": pa.array([f"c{number % 7}" for number in range(start, start + count)]),
            "image": pa.repeat(pa.scalar(self.picture, pa.binary()), count),
            "width": pa.repeat(16, count),
            "height": pa.repeat(48, count),
            "source_path": pa.array(paths),
        }
        return _table(columns, schema.IMAGES)

    def captions(self, start: int, count: int) -> pa.Table:
        pick = self._random("captions", start).integers(PEOPLE, size=(2, count * CAPTIONS_OF_ONE))
        named = {name: values.take(_each(count)) for name, values in _named(start, count).items()}
        keys = [schema.caption_id(image, n % CAPTIONS_OF_ONE) for n, image in enumerate(named["image_id"].to_pylist())]
        text = pc.binary_join_element_wise(self.told.take(pick[0]), self.ended.take(pick[1]), " ")
        return _table({**named, "caption_id": pa.array(keys), "text": text}, schema.CAPTIONS)

    def dialogues(self, start: int, count: int) -> pa.Table:
        random = self._random("dialogues", start)
        pick = random.integers(PEOPLE, size=(2, count))
        asked = len(QUESTIONS)
        said = pa.concat_arrays([answers.take(random.integers(PEOPLE, size=count)) for answers in self.answers])
        by_image = np.arange(count * asked).reshape(asked, count).T.ravel()
        turns = pa.StructArray.from_arrays(
            [pa.array(QUESTIONS).take(np.tile(np.arange(asked), count)), said.take(by_image)], ["question", "answer"]
        )
        columns = {
            "image_id": _named(start, count)["image_id"],
            "turns": pa.ListArray.from_arrays(np.arange(0, count * asked + 1, asked, dtype=np.int32), turns),
            "summary": pc.binary_join_element_wise(self.begun.take(pick[0]), self.ended.take(pick[1]), " "),
            "attributes": pa.array([{}] * count, schema.DIALOGUES.field("attributes").type),
            "flags": pa.array([[]] * count, pa.list_(pa.string())),
            "model": pa.repeat("oracle (simulated annotator, error rate 0.05)", count),
            "prompt_version": pa.repeat(PROMPT_VERSION, count),
            "generation_settings": pa.repeat("{}", count),
            **dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), pa.repeat(0, count)),
        }
        return _table(columns, schema.DIALOGUES)

    def gallery(self, start: int, count: int) -> pa.Table:
        columns = {**_named(start, count), "model_digest": pa.repeat(self.digest, count)}
        random = self._random("gallery", start)
        for name, width in zip(("global", "local"), self.widths, strict=True):
            values = random.standard_normal((count, width), dtype=np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16).ravel()), width)
        return _table(columns, schema.gallery(*self.widths))

    def _random(self, table: str, start: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, len(table), start])


def _path(number: int) -> str:
    return f"cam{number % 7}/{number // IMAGES_OF_ONE:07d}/{number:08d}.jpg"


def _named(start: int, count: int) -> dict[str, pa.Array]:
    """The columns that most tables share."""
    numbers = range(start, start + count)
    return {
        "image_id": pa.array([schema.image_id(_path(number)) for number in numbers]),
        "identity": pa.array(np.arange(start, start + count) // IMAGES_OF_ONE),
        "split": pa.repeat("test", count),
    }


def _each(count: int) -> np.ndarray:
    """Every image's number as often as it has captions."""
    return np.repeat(np.arange(count), CAPTIONS_OF_ONE)


def _table(columns: Mapping[str, pa.Array], wanted: pa.Schema) -> pa.Table:
    return pa.table([columns[field.name].cast(field.type) for field in wanted], schema=wanted)


def _publish(
    store: Store,
    made: Made,
    images: int,
    stage: str,
    made_from: dict[str, str],
    per_part: int,
    makers: Mapping[str, Make],
) -> None:
    def unit(number: int) -> Receipt:
        start = number * per_part
        rows = {table: make(made, start, min(per_part, images - start)) for table, make in makers.items()}
        return Receipt({table: store.write_part(table, VERSION, number, part) for table, part in rows.items()})

    with ThreadPoolExecutor(WRITERS) as writers:
        receipts = list(writers.map(unit, range(-(-images // per_part))))
    notes = {"model": "random", "counts": {}}
    store.publish(stage, VERSION, tuple(makers), receipts, made_from=made_from, config={}, notes=notes)


def _publish_model(store: Store) -> str:
    import torch

    from ceca.model.ceca import CECA
    from ceca.model.weights import publish_model, serialize

    torch.manual_seed(0)
    weights = serialize(CECA(TINY).eval().state_dict())
    return publish_model(
        store, "random", weights, model=TINY, config={}, training={}, made_from={}, version=VERSION
    ).digest
