"""Compare questions chosen for the candidates with questions in a fixed order and at random: which find a person first?

    python -m jobs.cli demo && python benchmarks/questions.py       # drawn pedestrians in demo/data, the model `ceca`

A simulated user looks for an image of the test split. The search begins with few words or with a whole caption. Few
words are the gender and one more attribute ("a man, jacket"): a person's images take the upper garment, the lower
garment, the shoes and the length of the hair in turn. The user then answers two questions with the truth. Images have
the attributes that the published dialogues tell (`attributes_of`), and some of these are wrong. The table shows two
ranks after no, one and two answers: the rank of the image, and the rank of the first image of its person.

    fixed      the next attribute of the vocabulary that the few words did not say
    static     the attribute that tells most about all images before anything is known, then the second of these
    random     any attribute that the few words did not say
    chosen     `ceca.search.questions.next_question`; it does not know what the few words said

There are three ways to use an answer:

    beliefs    update the candidates' probabilities (`ceca.search.questions.beliefs`)
    words      add its words to the query and embed the query again
    both       do both

Temperature and error rate are chosen on people of the validation split, among all images outside the test split, for
both beginnings together. Searches go over the images of the test split and over the images of all splits. Differences
of the reciprocal rank have a 95 % bootstrap interval over people.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from ceca.config import OracleConfig
from ceca.data.store import Store
from ceca.data.tables import find_dialogues, find_images, list_images
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
SAID = ("upper_kind", "lower_kind", "shoes_kind", "hair_length")  # the few words say one of these and the gender
ARMS = ("fixed", "static", "random", "chosen")
WAYS = ("beliefs", "words", "both")
STARTS = ("few words", "caption")
TEMPERATURES, ERROR_RATES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5), (0.02, 0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Dataset, model, and what is not to be chosen on the validation split."""

    data: str = "demo/data"
    model: str = "ceca"
    temperature: float = 0.0
    """Of `beliefs`; 0 chooses it on the validation split."""
    error_rate: float = 0.0
    """Of `beliefs`; 0 chooses it on the validation split."""
    hidden_error_rate: float | None = None
    """How often a simulated annotator errs about attributes that a view hides. The annotator then gives the images
    their attributes; with None the published dialogues do. Embeddings use the published summaries in both cases."""


class People:
    """Embedded images [N] with two sets of attributes: the annotated ones (`codes`) and the true ones (`truth`)."""

    def __init__(self, settings: Settings):
        store = Store(settings.data)
        images, dialogues = store.current("images"), store.current("dialogues")
        self.rows = list_images(store, find_dialogues(store, find_images(store, images), dialogues)[0])
        self.model, _ = load_model(store, settings.model)
        truth = store.belonging("attributes", images)
        assert truth is not None, "this benchmark needs drawn people"
        self.vocabulary: dict[str, list[str]] = truth.notes["vocabulary"]
        self.values = {facet: len(values) for facet, values in self.vocabulary.items()}
        drawn = {row["image_id"]: row for row in store.read(truth).to_pylist()}
        self.truth = [dict(drawn[row.image_id]["attributes"]) for row in self.rows]
        published = {row["image_id"]: row["turns"] for row in store.read(dialogues, ["image_id", "turns"]).to_pylist()}
        turns = [[(turn["question"], turn["answer"]) for turn in published[row.image_id]] for row in self.rows]
        if settings.hidden_error_rate is not None:
            engine = OracleEngine(OracleConfig(hidden_error_rate=settings.hidden_error_rate), self.vocabulary)
            views = [drawn[row.image_id]["view"] for row in self.rows]
            turns = asyncio.run(_ask(engine, [row.image_id for row in self.rows], self.truth, views))
        annotated = [attributes_of(turn, self.vocabulary) for turn in turns]
        self.codes = {
            facet: np.array([values.index(image[facet]) if facet in image else -1 for image in annotated])
            for facet, values in self.vocabulary.items()
        }
        self.identities = np.array([row.identity for row in self.rows])
        self.splits = np.array([row.split for row in self.rows])
        nth: Counter[int] = Counter()
        self.said = []
        captions = store.read(store.captions(images), ["image_id", "text"])
        texts = zip(captions["image_id"].to_pylist(), captions["text"].to_pylist(), strict=True)
        first = dict(reversed(list(texts)))  # an image's first caption
        self.captions = [first[row.image_id] for row in self.rows]
        for row in self.rows:
            self.said.append(SAID[nth[row.identity] % len(SAID)])
            nth[row.identity] += 1
        self.embedded = _embed(self.model, store, images, self.rows)
        self.texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def similarity(self, texts: Sequence[str]) -> np.ndarray:
        """Fused similarities [Q, N] of Q texts and all images; each text is embedded once."""
        new = sorted(set(texts) - set(self.texts))
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            self.texts |= dict(zip(batch, zip(*embed_texts(self.model, batch), strict=True), strict=True))
        query = tuple(torch.stack([self.texts[text][part] for text in texts]) for part in (0, 1))
        return fused_similarity((query[0], query[1]), self.embedded, OMEGA).numpy()


async def _ask(
    engine: OracleEngine, ids: Sequence[str], truth: Sequence[dict[str, str]], views: Sequence[str]
) -> list[list[tuple[str, str]]]:
    """Simulated dialogues about images: pairs of question and answer."""
    return [
        [(question, (await engine.answer(Subject(image, b"", true, view), [], question, 48)).text)
         for question in QUESTIONS]
        for image, true, view in zip(ids, truth, views, strict=True)
    ]  # fmt: skip


@torch.inference_mode()
def _embed(model: CECA, store: Store, images, rows) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Global and local embeddings of gallery images, [N, D] each."""
    parts = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        encoded = store.take(images, [(row.part, row.row) for row in batch], ["image"])["image"].to_pylist()
        size = model.config.image_height, model.config.image_width, model.config.image_resize
        pixels = normalize(torch.from_numpy(np.stack([decode_image(content, *size) for content in encoded])))
        parts.append(model.embed_gallery(pixels, trim(tokenize([row.summary for row in batch], model.config.context))))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def few_words(truth: dict[str, str], said: str) -> str:
    """Beginning of a search that says the gender and the facet `said`."""
    return f"A {truth['gender']}, {in_words(said, truth[said])}"


def in_words(facet: str, value: str) -> str:
    """An answer in the words of a caption."""
    thing, _, part = facet.partition("_")
    noun = {"upper": "top", "lower": "trousers", "carried": "bag"}.get(thing, thing)
    if value in ("none", "bald"):
        return {"hair": "no hair", "hat": "no hat", "lower": "nothing over the legs"}.get(thing, "nothing in the hands")
    return value if part in ("", "kind") else f"{value} {noun}"


@dataclasses.dataclass
class Run:
    """Results of conversations about T targets after no, one and two answers, [T, 3] each.

    Args:
        image: rank of the target.
        person: rank of the first image of the target's person.
        bits: -log2 of the probability of the person's images together.
        asked: how often each facet was asked about.
    """

    image: np.ndarray
    person: np.ndarray
    bits: np.ndarray
    asked: Counter[str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One of ARMS, WAYS and STARTS each, with temperature and error rate of `beliefs`."""

    arm: str
    way: str
    start: str
    temperature: float
    error_rate: float


def converse(people: People, targets: np.ndarray, candidates: np.ndarray, plan: Plan, seed: int = 0) -> Run:
    """Hold a conversation about each of the images `targets` among `candidates`, both rows of `people`."""
    codes = {facet: annotated[candidates] for facet, annotated in people.codes.items()}
    identities = people.identities[candidates]
    choose_facet = _chooser(people, codes, plan, seed)
    texts = [people.captions[target] for target in targets]
    if plan.start == "few words":
        texts = [few_words(people.truth[target], people.said[target]) for target in targets]
    answers: list[dict[str, int | None]] = [{} for _ in targets]
    empty = np.zeros((len(targets), ANSWERS + 1))
    run = Run(empty.copy(), empty.copy(), empty.copy(), Counter())
    for step in range(ANSWERS + 1):
        similarity = people.similarity(texts)[:, candidates]
        for n, target in enumerate(targets):
            counted = {} if plan.way == "words" else answers[n]
            belief = beliefs(
                similarity[n],
                codes,
                people.values,
                counted,
                temperature=plan.temperature,
                error_rate=plan.error_rate,
            )
            of_target = belief[np.flatnonzero(candidates == target)[0]]
            of_person = belief[identities == people.identities[target]]
            run.image[n, step] = 1 + (belief > of_target).sum()
            run.person[n, step] = 1 + (belief > of_person.max()).sum()
            run.bits[n, step] = -np.log2(of_person.sum())
            if step == ANSWERS:
                continue
            facet = choose_facet(target, belief, answers[n])
            run.asked[facet or "(nothing)"] += 1
            if facet is None:
                continue
            value = people.truth[target][facet]
            answers[n][facet] = people.vocabulary[facet].index(value)
            if plan.way != "beliefs":
                texts[n] += f", {in_words(facet, value)}"
    return run


def _chooser(
    people: People, codes: dict[str, np.ndarray], plan: Plan, seed: int
) -> Callable[[int, np.ndarray, dict[str, int | None]], str | None]:
    """The arm's choice of a facet to ask about.

    Returns:
        Function of a target, the candidates' probabilities and the answers so far. It returns None if no question
        tells anything more.
    """
    random = np.random.default_rng(seed)
    count = len(next(iter(codes.values())))
    static = _static(codes, people.values, count, plan.error_rate)

    def choose_facet(target: int, belief: np.ndarray, answers: dict[str, int | None]) -> str | None:
        if plan.arm == "chosen":
            question = next_question(belief, codes, people.values, answers, error_rate=plan.error_rate)
            return question and question.facet
        said = {"gender", people.said[target]} if plan.start == "few words" else set()
        left = [facet for facet in people.vocabulary if facet not in said and facet not in answers]
        if plan.arm == "fixed":
            return left[0]
        if plan.arm == "static":
            return next(facet for facet in static if facet in left)
        return left[int(random.integers(len(left)))]

    return choose_facet


def _static(codes: dict[str, np.ndarray], values: dict[str, int], count: int, error_rate: float) -> list[str]:
    """Facets in the order of what they tell about candidates that are equally probable."""
    order: list[str] = []
    uniform = np.full(count, 1 / count)
    while question := next_question(uniform, codes, values, order, error_rate=error_rate):
        order.append(question.facet)
    return order


def choose(people: People, way: str) -> tuple[float, float]:
    """Choose temperature and error rate on the validation split.

    They minimise `Run.bits`, averaged over no, one and two answers. The questions are at random, so that they do not
    depend on the values tried. The table printed also has the reciprocal ranks after two chosen questions.
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
                run = converse(people, targets, candidates, Plan("random", way, start, temperature, rate))
                mean = float(run.bits.mean())
                bits[temperature, rate] = bits.get((temperature, rate), 0) + mean
                cells.append(f"{mean:7.2f}")
        for start in STARTS:
            for rate in ERROR_RATES:
                run = converse(people, targets, candidates, Plan("chosen", way, start, temperature, rate))
                cells.append(f"{(1 / run.person[:, -1]).mean():7.3f}")
        print(f"{temperature:8g}" + "".join(cells), flush=True)
    return min(bits, key=lambda key: bits[key])


def main(settings: Settings) -> None:
    torch.set_grad_enabled(False)
    people = People(settings)
    coverage = ", ".join(f"{facet} {(values >= 0).mean():.0%}" for facet, values in people.codes.items())
    print(f"{len(people.rows):,} images; attributes known: {coverage}")
    chosen = {}
    for way in WAYS:
        temperature, rate = settings.temperature, settings.error_rate
        if not (temperature and rate):
            best_temperature, best_rate = choose(people, way)
            temperature, rate = temperature or best_temperature, rate or best_rate
        chosen[way] = temperature, rate
        print(f"{way}: temperature {temperature:g}, error rate {rate:g}")
    targets = np.flatnonzero(people.splits == "test")
    for start in STARTS:
        for candidates in (targets, np.arange(len(people.rows))):
            report(people, start, targets, candidates, chosen)


def report(
    people: People, start: str, targets: np.ndarray, candidates: np.ndarray, chosen: dict[str, tuple[float, float]]
) -> None:
    """Print the table of one beginning.

    Args:
        people: all images.
        start: one of STARTS.
        targets: rows of the images that are looked for.
        candidates: rows of the images that are searched.
        chosen: way -> temperature and error rate.
    """
    persons = len(set(people.identities[targets].tolist()))
    print(f"\n{start}: {len(candidates):,} images, {len(targets)} targets of {persons} people")
    print(f"{'':18}{'rank of the image':^24}{'rank of the person':^24}{'reciprocal, person':^21}")
    print(f"{'':18}" + f"{'0':>8}{'1':>8}{'2':>8}" * 2 + f"{'0':>7}{'1':>7}{'2':>7}   answers")
    runs: dict[tuple[str, str], Run] = {}
    for way, arm in itertools.product(WAYS, ARMS):
        run = runs[way, arm] = converse(people, targets, candidates, Plan(arm, way, start, *chosen[way]))
        cells = "".join(f"{mean:8.1f}" for ranks in (run.image, run.person) for mean in ranks.mean(axis=0))
        cells += "".join(f"{mean:7.3f}" for mean in (1 / run.person).mean(axis=0))
        print(f"{way:9}{arm:9}{cells}")
    identities = people.identities[targets]

    def differ(first: tuple[str, str], second: tuple[str, str]) -> str:
        gain = paired_bootstrap(1 / runs[first].person[:, -1], 1 / runs[second].person[:, -1], identities)
        return f"{' '.join(second):16} - {' '.join(first):16}{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"

    print("reciprocal rank of the person after two answers, difference and 95 % interval")
    for way, arm in itertools.product(WAYS, ARMS[:-1]):
        print(f"    {differ((way, arm), (way, 'chosen'))}")
    for first, second in (("words", "beliefs"), ("beliefs", "both"), ("words", "both")):
        print(f"    {differ((first, 'chosen'), (second, 'chosen'))}")
    for way in WAYS:
        print(f"asked, {way}: " + ", ".join(f"{f} {n}" for f, n in runs[way, "chosen"].asked.most_common()))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
