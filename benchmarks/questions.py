"""Whether a question chosen for the candidates finds a person sooner than questions in a fixed order or at random.

    python -m jobs.cli demo && python benchmarks/questions.py       # drawn pedestrians in demo/data, the model `ceca`

A simulated user looks for an image of the test split and begins with few words, the gender and one thing more (of a
person's images in turn the upper garment, the lower one, the shoes or the length of the hair: "a man, jacket"), or with
a whole caption. The user then answers two questions, truly. Images have the attributes that the published dialogues
tell (`attributes_of`), and these err. Ranks are of that image, and of the first image of its person, after no, one and
two answers.

    fixed      the next attribute of the vocabulary that the few words did not say
    static     the attribute that tells most about all images before anything is known, then the second
    random     any attribute that the few words did not say
    chosen     `ceca.search.questions.next_question`; nobody tells it what the words said

An answer can be taken in three ways:

    beliefs    the candidates' probabilities (`ceca.search.questions.beliefs`)
    words      its words are added to the query, which is embedded again
    both

Temperature and error rate are chosen on people of the validation split among all images but those of the test split,
for both beginnings together. Searches go over the test split's images and over all splits'. Differences of the
reciprocal rank have a bootstrap's 95 % interval over people.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from ceca.config import OracleConfig
from ceca.data.store import Store
from ceca.data.tables import add_summaries, list_images
from ceca.datasets.images import decode_image
from ceca.dialogue.attributes import attributes_of
from ceca.dialogue.conversation import QUESTIONS, Subject
from ceca.dialogue.oracle import OracleEngine
from ceca.evaluation.significance import paired_bootstrap
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA, fused_similarity
from ceca.model.embed import embed_texts, normalize
from ceca.model.weights import load_model
from ceca.search.questions import beliefs, next_question

OMEGA, BATCH, ANSWERS = 0.3, 64, 2
SAID = ("upper_kind", "lower_kind", "shoes_kind", "hair_length")  # besides the gender
ARMS = ("fixed", "static", "random", "chosen")
WAYS = ("beliefs", "words", "both")
STARTS = ("few words", "caption")
TEMPERATURES, ERROR_RATES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5), (0.02, 0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked about."""

    data: str = "demo/data"
    model: str = "ceca"
    temperature: float = 0.0
    """0: chosen on the validation split."""
    error_rate: float = 0.0
    """Of `beliefs`; 0: chosen on the validation split."""
    hidden_error_rate: float | None = None
    """The attributes that images have come from a simulated annotator that errs so often in what a view hides; none:
    from the published dialogues. The embeddings are of the published summaries in either case."""


class People:
    """Images, embedded, with the attributes that are told of them and the true ones."""

    def __init__(self, settings: Settings):
        store = Store(settings.data)
        images, dialogues = store.current("images"), store.current("dialogues")
        self.rows, _ = add_summaries(store, list_images(store, images), images, dialogues)
        self.model, _ = load_model(store, settings.model)
        truth = store.current("attributes")
        self.vocabulary: dict[str, list[str]] = truth.notes["vocabulary"]
        self.values = {facet: len(values) for facet, values in self.vocabulary.items()}
        drawn = {row["image_id"]: row for row in store.read(truth).to_pylist()}
        self.truth = [dict(drawn[row.image_id]["attributes"]) for row in self.rows]
        told = {row["image_id"]: row["turns"] for row in store.read(dialogues, ["image_id", "turns"]).to_pylist()}
        turns = [[(turn["question"], turn["answer"]) for turn in told[row.image_id]] for row in self.rows]
        if settings.hidden_error_rate is not None:
            engine = OracleEngine(OracleConfig(hidden_error_rate=settings.hidden_error_rate), self.vocabulary)
            views = [drawn[row.image_id]["view"] for row in self.rows]
            turns = asyncio.run(_ask(engine, [row.image_id for row in self.rows], self.truth, views))
        found = [attributes_of(turn, self.vocabulary) for turn in turns]
        self.codes = {
            facet: np.array([values.index(one[facet]) if facet in one else -1 for one in found])
            for facet, values in self.vocabulary.items()
        }
        self.identities = np.array([row.identity for row in self.rows])
        self.splits = np.array([row.split for row in self.rows])
        nth: Counter[int] = Counter()
        self.said = []
        captions = store.read(store.current("captions"), ["image_id", "text"])
        texts = zip(captions["image_id"].to_pylist(), captions["text"].to_pylist(), strict=True)
        first = dict(reversed(list(texts)))  # of several captions the first
        self.captions = [first[row.image_id] for row in self.rows]
        for row in self.rows:
            self.said.append(SAID[nth[row.identity] % len(SAID)])
            nth[row.identity] += 1
        self.embedded = _embed(self.model, store, images, self.rows)
        self.texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def similarity(self, texts: Sequence[str]) -> np.ndarray:
        """[Q, N], of each text and every image; a text is embedded once."""
        new = sorted(set(texts) - set(self.texts))
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            self.texts |= dict(zip(batch, zip(*embed_texts(self.model, batch), strict=True), strict=True))
        query = tuple(torch.stack([self.texts[text][part] for text in texts]) for part in (0, 1))
        return fused_similarity((query[0], query[1]), self.embedded, OMEGA).numpy()


async def _ask(
    engine: OracleEngine, ids: Sequence[str], truth: Sequence[dict[str, str]], views: Sequence[str]
) -> list[list[tuple[str, str]]]:
    return [
        [(question, (await engine.answer(Subject(image, b"", true, view), [], question, 48)).text)
         for question in QUESTIONS]
        for image, true, view in zip(ids, truth, views, strict=True)
    ]  # fmt: skip


@torch.inference_mode()
def _embed(model: CECA, store: Store, images, rows) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    parts = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        encoded = store.take(images, [(row.part, row.row) for row in batch], ["image"])["image"].to_pylist()
        size = model.config.image_height, model.config.image_width
        pixels = normalize(torch.from_numpy(np.stack([decode_image(content, *size) for content in encoded])))
        parts.append(model.embed_gallery(pixels, trim(tokenize([row.summary for row in batch]))))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def few_words(truth: dict[str, str], said: str) -> str:
    return f"A {truth['gender']}, {in_words(said, truth[said])}"


def in_words(facet: str, value: str) -> str:
    """An answer as a caption would say it."""
    thing, _, part = facet.partition("_")
    noun = {"upper": "top", "lower": "trousers", "carried": "bag"}.get(thing, thing)
    if value in ("none", "bald"):
        return {"hair": "no hair", "hat": "no hat", "lower": "nothing over the legs"}.get(thing, "nothing in the hands")
    return value if part in ("", "kind") else f"{value} {noun}"


@dataclasses.dataclass
class Run:
    """[T, 3] ranks after no, one and two answers, and what was asked."""

    image: np.ndarray
    person: np.ndarray
    bits: np.ndarray  # -log2 of what is believed of the person's images together
    asked: Counter[str]


def converse(
    people: People,
    targets: np.ndarray,
    candidates: np.ndarray,
    arm: str,
    way: str,
    start: str,
    temperature: float,
    error_rate: float,
    seed: int = 0,
) -> Run:
    """Conversations about the images `targets` among `candidates`, both rows of `people`."""
    codes = {facet: found[candidates] for facet, found in people.codes.items()}
    values, identities = people.values, people.identities[candidates]
    random = np.random.default_rng(seed)
    static = _static(codes, values, len(candidates), error_rate)
    texts = [people.captions[target] for target in targets]
    if start == "few words":
        texts = [few_words(people.truth[target], people.said[target]) for target in targets]
    answers: list[dict[str, int | None]] = [{} for _ in targets]
    empty = np.zeros((len(targets), ANSWERS + 1))
    run = Run(empty.copy(), empty.copy(), empty.copy(), Counter())
    for step in range(ANSWERS + 1):
        similarity = people.similarity(texts)[:, candidates]
        for n, target in enumerate(targets):
            counted = {} if way == "words" else answers[n]
            belief = beliefs(similarity[n], codes, values, counted, temperature=temperature, error_rate=error_rate)
            own = np.flatnonzero(candidates == target)[0]
            run.image[n, step] = 1 + (belief > belief[own]).sum()
            run.person[n, step] = 1 + (belief > belief[identities == people.identities[target]].max()).sum()
            run.bits[n, step] = -np.log2(belief[identities == people.identities[target]].sum())
            if step == ANSWERS:
                continue
            said = {"gender", people.said[target]} if start == "few words" else set()
            left = [name for name in people.vocabulary if name not in said and name not in answers[n]]
            if arm == "fixed":
                facet = left[0]
            elif arm == "static":
                facet = next(name for name in static if name in left)
            elif arm == "random":
                facet = left[int(random.integers(len(left)))]
            else:
                question = next_question(belief, codes, values, answers[n], error_rate=error_rate)
                if question is None:
                    run.asked["(nothing)"] += 1
                    continue
                facet = question.facet
            run.asked[facet] += 1
            value = people.truth[target][facet]
            answers[n][facet] = people.vocabulary[facet].index(value)
            if way != "beliefs":
                texts[n] += f", {in_words(facet, value)}"
    return run


def _static(codes: dict[str, np.ndarray], values: dict[str, int], count: int, error_rate: float) -> list[str]:
    """Facets by what they tell of all candidates alike."""
    order: list[str] = []
    alike = np.full(count, 1 / count)
    while question := next_question(alike, codes, values, order, error_rate=error_rate):
        order.append(question.facet)
    return order


def choose(people: People, way: str) -> tuple[float, float]:
    """Temperature and error rate that leave least to doubt on validation: bits, the mean after 0, 1 and 2 answers.

    The questions are at random, so that what is asked does not depend on what is chosen. Reciprocal ranks after two
    chosen questions are shown beside them.
    """
    candidates = np.flatnonzero(people.splits != "test")
    targets = np.flatnonzero(people.splits == "val")
    print(f"\n{way}, validation, by temperature (down) and error rate (across)")
    print(f"{'':8}{'bits, few words':^28}{'bits, caption':^28}{'reciprocal, few words':^28}{'reciprocal, caption':^28}")
    print(f"{'':8}" + "".join(f"{rate:7g}" for rate in ERROR_RATES) * 4)
    bits: dict[tuple[float, float], float] = {}
    for temperature in TEMPERATURES:
        cells: list[str] = []
        for start in STARTS:
            for rate in ERROR_RATES:
                run = converse(people, targets, candidates, "random", way, start, temperature, rate)
                found = float(run.bits.mean())
                bits[temperature, rate] = bits.get((temperature, rate), 0) + found
                cells.append(f"{found:7.2f}")
        for start in STARTS:
            for rate in ERROR_RATES:
                run = converse(people, targets, candidates, "chosen", way, start, temperature, rate)
                cells.append(f"{(1 / run.person[:, -1]).mean():7.3f}")
        print(f"{temperature:8g}" + "".join(cells), flush=True)
    return min(bits, key=lambda key: bits[key])


def main(settings: Settings) -> None:
    torch.set_grad_enabled(False)
    people = People(settings)
    coverage = ", ".join(f"{facet} {(found >= 0).mean():.0%}" for facet, found in people.codes.items())
    print(f"{len(people.rows):,} images; attributes known: {coverage}")
    chosen = {}
    for way in WAYS:
        temperature, rate = settings.temperature, settings.error_rate
        if not (temperature and rate):
            found = choose(people, way)
            temperature, rate = temperature or found[0], rate or found[1]
        chosen[way] = temperature, rate
        print(f"{way}: temperature {temperature:g}, error rate {rate:g}")
    targets = np.flatnonzero(people.splits == "test")
    for start in STARTS:
        for candidates in (targets, np.arange(len(people.rows))):
            report(people, start, targets, candidates, chosen)


def report(
    people: People, start: str, targets: np.ndarray, candidates: np.ndarray, chosen: dict[str, tuple[float, float]]
) -> None:
    persons = len(set(people.identities[targets].tolist()))
    print(f"\n{start}: {len(candidates):,} images, {len(targets)} targets of {persons} people")
    print(f"{'':18}{'rank of the image':^24}{'rank of the person':^24}{'reciprocal, person':^21}")
    print(f"{'':18}" + f"{'0':>8}{'1':>8}{'2':>8}" * 2 + f"{'0':>7}{'1':>7}{'2':>7}   answers")
    runs: dict[tuple[str, str], Run] = {}
    for way, arm in itertools.product(WAYS, ARMS):
        run = runs[way, arm] = converse(people, targets, candidates, arm, way, start, *chosen[way])
        cells = "".join(f"{mean:8.1f}" for ranks in (run.image, run.person) for mean in ranks.mean(axis=0))
        cells += "".join(f"{mean:7.3f}" for mean in (1 / run.person).mean(axis=0))
        print(f"{way:9}{arm:9}{cells}")
    identities = people.identities[targets]

    def differ(first: tuple[str, str], second: tuple[str, str]) -> str:
        found = paired_bootstrap(1 / runs[first].person[:, -1], 1 / runs[second].person[:, -1], identities)
        return f"{' '.join(second):16} - {' '.join(first):16}{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"

    print("reciprocal rank of the person after two answers, difference and 95 % interval")
    for way, arm in itertools.product(WAYS, ARMS[:-1]):
        print(f"    {differ((way, arm), (way, 'chosen'))}")
    for first, second in (("words", "beliefs"), ("beliefs", "both"), ("words", "both")):
        print(f"    {differ((first, 'chosen'), (second, 'chosen'))}")
    for way in WAYS:
        print(f"asked, {way}: " + ", ".join(f"{f} {n}" for f, n in runs[way, "chosen"].asked.most_common()))


if __name__ == "__main__":
    main(tyro.cli(Settings))
