"""What planning and serving cost as a dataset grows: seconds and memory of drivers and of replicas.

    python benchmarks/scale.py                              # 10^5 and 10^6 images
    python benchmarks/scale.py --images 1000000 --keep /data/made --sections index train
    python benchmarks/scale.py --images 10000000 --no-embeddings
    python benchmarks/scale.py --images 100000 300000 1000000 --picture docs/scale.webp

Each section is measured in a process of its own over a dataset of `benchmarks.made`. Memory is the peak beyond Python,
its libraries and the dataset's manifests. The second table has the cost per image, and how it grew.

    dialogue   the stage's units of images to ask about
    index      its units of images to embed, with their summaries
    evaluate   its units of images and of captions to embed
    train      the pairs of images and captions with their summaries
    tokens     token ids of the captions of a dataset
    receipts   the receipts of a finished stage of 128 images a unit, and a look for their parts
    ingress    what an ingress replica reads before it is ready, on a machine that has served nothing
    ingress 2  the next such replica on that machine
    replica    a search replica opens the gallery, on a machine that has served nothing
    replica 2  the next one; memory is its own, without the files that it maps
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import ArmFailed, in_own_process, machine, own_memory, peak_memory, run_benchmark
from benchmarks.made import WIDTHS, make_dataset
from ceca.config import DialogueConfig, EvaluateConfig, IndexConfig, TrainConfig
from ceca.data.store import Receipt, Store

FEW = 4, 4  # numbers in the embeddings where only what is known of them is measured
UNFINISHED = "unfinished"  # version of the receipts that are read


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes, and what is measured."""

    images: tuple[int, ...] = (100_000, 1_000_000)
    """Numbers of images; a column each."""
    sections: tuple[str, ...] = ()
    """What is measured; by default everything."""
    embeddings: bool = True
    """Make embeddings of 512 + 1,024 numbers. Otherwise they have 4 + 4, and no search replica is measured."""
    keep: str = ""
    """Folder in which the datasets are left, and found again by the next run."""
    picture: str = ""
    """File of a picture of the cost per image."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one section: seconds, those of a CPU, and bytes beyond what the process had before."""

    seconds: float
    cpu: float
    memory: int
    said: str = ""


def main(settings: Settings) -> None:
    print(machine())
    costs: dict[tuple[str, int], Cost] = {}
    with contextlib.ExitStack() as left:
        folder = settings.keep or left.enter_context(tempfile.TemporaryDirectory(prefix="ceca-scale-"))
        for images in settings.images:
            place = Path(folder) / str(images)
            place.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            make_dataset(str(place / "data"), images, widths=WIDTHS if settings.embeddings else FEW)
            print(f"\n{images:,} images, made in {time.perf_counter() - started:.0f} s")
            print(f"{'':12}{'seconds':>10}{'of a CPU':>10}{'memory':>12}{'CPU µs/image':>14}{'bytes/image':>13}")
            for section in settings.sections or SECTIONS:
                if section.startswith("replica") and not settings.embeddings:
                    continue
                try:
                    cost = Cost(
                        **in_own_process(
                            __file__, section, settings, place, environment={"CECA_CACHE": str(place / "cache")}
                        )
                    )
                except ArmFailed as error:
                    print(f"{section:12} failed: {str(error).splitlines()[-1]}")
                    continue
                costs[section, images] = cost
                each = f"{1e6 * cost.cpu / images:14.2f}{cost.memory / images:13.0f}"
                spent = f"{cost.seconds:10.2f}{cost.cpu:10.2f}{cost.memory / 1e6:9.0f} MB"
                print(f"{section:12}{spent}{each}  {cost.said}", flush=True)
    smallest, largest = min(settings.images), max(settings.images)
    if smallest < largest:
        print(f"\nCPU time and memory per image at {largest:,} images, divided by those at {smallest:,} images")
        for section in settings.sections or SECTIONS:
            if (section, smallest) in costs and (section, largest) in costs:
                few, many = costs[section, smallest], costs[section, largest]
                growth = [
                    after / before * smallest / largest
                    for before, after in ((few.cpu, many.cpu), (few.memory, many.memory))
                ]
                print(f"{section:12}" + "".join(f"{times:10.2f}x" for times in growth))
    if settings.picture:
        draw(costs, Path(settings.picture))


def draw(costs: dict[tuple[str, int], Cost], picture: Path) -> None:
    """Draw CPU time and memory per image over the number of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, memory = figure.subplots(1, 2)
    planned = [section for section in SECTIONS if section not in ("tokens", "receipts", "replica", "replica 2")]
    for section in planned:
        sizes = sorted(images for name, images in costs if name == section)
        times.plot(sizes, [1e6 * costs[section, images].cpu / images for images in sizes], marker="o", label=section)
        memory.plot(sizes, [costs[section, images].memory / images for images in sizes], marker="o", label=section)
    for axes, label in ((times, "CPU time per image in µs"), (memory, "memory of the driver per image in bytes")):
        axes.set(xscale="log", xlabel="images", title=label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    figure.savefig(picture, dpi=110)


# --- sections ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planned(module: str) -> Iterator[list[Any]]:
    """Catch the plans of a stage instead of doing their units.

    The units are written as JSON once, as they are on the way to the workers.
    """
    plans: list[Any] = []
    stage = importlib.import_module(module)

    def catch(store: Store, plan: Any, *_: Any, **__: Any) -> dict[str, Any]:
        plans.append([{"unit": number, "work": json.dumps(unit)} for number, unit in enumerate(plan.units)])
        raise _Planned

    before = stage.run_plan  # type: ignore[attr-defined]
    stage.run_plan = catch  # type: ignore[attr-defined]
    try:
        yield plans
    except _Planned:
        pass
    finally:
        stage.run_plan = before  # type: ignore[attr-defined]


class _Planned(Exception):
    """The plan is made."""


def plan_dialogue(store: Store) -> Callable[[], str]:
    from jobs.dialogue import dialogue

    return _plan("jobs.dialogues.common", lambda: dialogue(store.uri, DialogueConfig(engine="openai")))


def plan_index(store: Store) -> Callable[[], str]:
    from jobs.index import index

    return _plan("jobs.index", lambda: index(store.uri, IndexConfig(model="random")))


def plan_evaluate(store: Store) -> Callable[[], str]:
    from jobs.evaluations.embedding import embed_split

    return _plan("jobs.evaluations.embedding", lambda: embed_split(store, EvaluateConfig(model="random")))


def _plan(module: str, stage: Callable[[], Any]) -> Callable[[], str]:
    def plan() -> str:
        with planned(module) as plans:
            stage()
        size = sum(len(unit["work"]) for unit in plans[0])
        return f"{len(plans[0]):,} units, {size / 1e6:.1f} MB of JSON"

    return plan


def pair(store: Store) -> Callable[[], str]:
    from jobs.training.samples import training_pairs
    from jobs.training.sets import input_tables

    config = TrainConfig(split="test")

    def make() -> str:
        pairs = training_pairs(store, config, input_tables(store, config))
        return f"{len(pairs):,} pairs"

    return make


def tokens(store: Store) -> Callable[[], str]:
    from ceca.model.tokens import tokenize_numpy

    captions = store.current("captions")
    texts = [text for part in range(min(20, len(captions.parts))) for text in _texts(store, part)]
    tokenize_numpy(texts[:1000])

    def make() -> str:
        started, cpu = time.perf_counter(), time.process_time()
        tokenize_numpy(texts)
        rate = len(texts) / (time.perf_counter() - started)
        return f"{rate:,.0f} texts/s, {len(texts) / (time.process_time() - cpu):,.0f} per second of a CPU"

    return make


def _texts(store: Store, part: int) -> list[str]:
    captions = store.current("captions")
    texts: list[str] = store.read_columns(captions, part, ["text"])["text"].to_pylist()
    return texts


def receipts(store: Store) -> Callable[[], str]:
    dialogues = store.current("dialogues")
    if not store.names(".work", "dialogue", UNFINISHED):
        for unit, part in enumerate(dialogues.parts):
            store.write_receipt("dialogue", UNFINISHED, unit, Receipt({"dialogues": part}))

    def read() -> str:
        done = store.receipts("dialogue", UNFINISHED)
        missing = store.missing("dialogues", [receipt.parts["dialogues"] for receipt in done.values()])
        return f"{len(done):,} receipts, {len(missing)} parts missing"

    return read


def ingress(store: Store) -> Callable[[], str]:
    from serve.snapshot import read_snapshot

    return lambda: f"{len(read_snapshot(store, 'random').catalogue):,} images"


def replica(store: Store) -> Callable[[], str]:
    from ceca.search.edition import find_edition
    from ceca.search.gallery import open_gallery

    edition, opened = find_edition(store, "random"), []

    def work() -> str:
        opened.append(open_gallery(edition))  # kept, so that its memory counts
        return f"{len(opened[0]):,} rows"

    return work


SECTIONS: dict[str, Callable[[Store], Callable[[], str]]] = {
    "dialogue": plan_dialogue,
    "index": plan_index,
    "evaluate": plan_evaluate,
    "train": pair,
    "tokens": tokens,
    "receipts": receipts,
    "ingress": ingress,
    "ingress 2": ingress,
    "replica": replica,
    "replica 2": replica,
}


def measure(section: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Cost of one section over the dataset in `folder`."""
    importlib.import_module("pandas")  # Arrow imports this library, of 20 MB, with its first array
    if section in ("ingress", "replica"):
        shutil.rmtree(folder / "cache", ignore_errors=True)
    work = SECTIONS[section](Store(str(folder / "data")))
    memory = own_memory if section.startswith("replica") else peak_memory
    before, started, cpu = memory(), time.perf_counter(), time.process_time()
    said = work()
    spent = time.perf_counter() - started, time.process_time() - cpu
    return dataclasses.asdict(Cost(*spent, memory() - before, said))


if __name__ == "__main__":
    run_benchmark(main, Settings, {name: functools.partial(measure, name) for name in SECTIONS}, __doc__)
