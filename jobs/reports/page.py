"""All figures and tables of a dataset in one HTML file; each figure also lies beside it as PNG and SVG."""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from ceca.config import EvaluateConfig, Split
from ceca.data.names import COMPARISONS, EVALUATIONS
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.evaluation.names import METRICS, SIMILARITIES
from ceca.model.registry import find_model, list_models, require_model
from ceca.report.html import paragraph, picture, table, write_page
from jobs.compare import labelled
from jobs.evaluate import evaluate
from jobs.reports.figures import (
    OMEGA_HELP,
    report_attributes,
    report_confidence,
    report_dialogues,
    report_omega,
    report_ranked,
    report_significance,
    report_statistics,
    report_training,
)
from jobs.runtime.console import console

Section = tuple[str, list[str]]
RERANKED = ("rank1", "mean_average_precision")  # figures that are shown without and with re-ranking


class Figures:
    """Draws each figure as PNG and SVG in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, draw: Callable[[Path], Any], description: str, *, photographs: bool = False) -> str:
        """Draw a figure; returns its HTML: photographs as PNG, other figures as SVG.

        Args:
            name: name of the files, without suffix.
            draw: writes PNG and SVG to a path without suffix.
            description: text for readers who do not see the figure.
            photographs: the figure contains photographs.
        """
        draw(self.folder / name)
        return picture(self.folder / f"{name}{'.png' if photographs else '.svg'}", description)


def report_page(
    data: Annotated[str, tyro.conf.arg(help="dataset URI")],
    models: Annotated[
        tuple[str, ...], tyro.conf.arg(help="published models; default: all models of this dataset")
    ] = (),
    split: Annotated[Split, tyro.conf.arg(help="the split to evaluate")] = "test",
    omega: Annotated[float | None, tyro.conf.arg(help=OMEGA_HELP)] = None,
    folder: Annotated[Path, tyro.conf.arg(help="where index.html and the figures are written")] = Path("report"),
    seed: Annotated[int, tyro.conf.arg(help="chooses the samples")] = 0,
) -> Path:
    """Everything about a dataset and its models in one HTML file."""
    store = Store(data)
    names = models or tuple(name for name in list_models(store) if find_model(store, name))
    if not names:
        raise UserError(f"{store.uri} has no published model to report on; run the stage `train` first")
    if omega is not None and not 0 <= omega <= 1:
        raise UserError(f"--omega must be between 0 and 1, found {omega}")
    figures = Figures(folder)
    results = {name: evaluate(data, EvaluateConfig(model=name, split=split, omega=omega)) for name in names}
    best = max(names, key=lambda name: results[name]["metrics"]["fused"]["rsum"])
    other = next((name for name in names if name != best), None)
    pair = tuple(name for name in (other, best) if name)
    sections: list[Section] = [
        ("Results", _results({require_model(store, name).label(name): result for name, result in results.items()})),
        ("Local and global similarity", _omega(figures, data, names, split)),
        *reranked_section(store, names, split),
        ("Probably nobody", _confidence(figures, data, names, split)),
        ("Ranked lists", _ranked(figures, data, pair, split, omega, seed)),
        *_attributes(figures, store, best, split, omega),
        ("Training", _training(figures, store, names)),
        ("Dataset", _dataset(figures, store, data)),
        *_samples(figures, store, data, seed),
    ]
    if other:
        sections[0][1].append(_significance(data, (other, best), split))
    sections[0][1].extend(_comparisons(figures, store))
    first = results[best]
    lead = (
        f"Split {split}: {first['queries']:,} sentences, {first['gallery']:,} images. "
        f"Best by Rsum: {require_model(store, best).label(best)}. {store.uri}, {time.strftime('%Y-%m-%d')}."
    )
    out = write_page("Text-to-image person retrieval", lead, sections, folder / "index.html")
    console.print(f"report: {', '.join(names)} → {out} ({out.stat().st_size / 1e6:.1f} MB, complete in itself)")
    return out


def _row(name: str, metrics: dict[str, float]) -> list[str]:
    return [name, *(f"{metrics[key]:.2f}" for key in METRICS)]


def _results(results: dict[str, Any]) -> list[str]:
    headings = ["", *METRICS.values()]
    omegas = ", ".join(sorted({f"ω = {result['omega']:g}" for result in results.values()}))
    if "," in omegas:
        results = {f"{name}, ω = {result['omega']:g}": result for name, result in results.items()}
    protocols = " and ".join(sorted({result["protocol"] for result in results.values()}))
    parts = []
    for key, title in (("metrics", "Text to image"), ("image_to_text", "Image to text")):
        rows = [_row(name, result[key]["fused"]) for name, result in results.items()]
        chance = next(iter(results.values()))[key]["chance"]
        parts.append(
            table(
                f"{title}, {omegas}, protocol {protocols}, percent",
                headings,
                [*rows, _row("chance", chance)],
                best=True,
            )
        )
    rows = [
        _row(f"{name}, {similarity}", result["metrics"][similarity])
        for name, result in results.items()
        for similarity in SIMILARITIES
    ]
    return [*parts, table(f"Text to image by similarity, protocol {protocols}, percent", headings, rows)]


def _significance(data: str, models: tuple[str, str], split: Split) -> str:
    differences = report_significance(data, models, split)
    labels = [require_model(Store(data), name).label(name) for name in models]
    rows = [[label, *difference.cells()] for label, difference in differences.items()]
    caption = f"{labels[1]} minus {labels[0]}: paired bootstrap over the people described"
    return table(caption, ["", "difference", "95 % interval", "p"], rows)


def _comparisons(figures: Figures, store: Store) -> list[str]:
    """The tables of `ceca compare`: several seeds of each method."""
    from ceca.report.figures import draw_comparison

    parts = []
    for number, name in enumerate(store.names(COMPARISONS)):
        comparison: dict[str, Any] = store.read_json(COMPARISONS, name) or {}
        summary = labelled(comparison)
        rows = [
            [method, *(f"{row[key][0]:.2f} ± {row[key][1]:.2f}" for key in METRICS)] for method, row in summary.items()
        ]
        caption = (
            f"{comparison['recipe']}, split {comparison['split']}, {comparison['seeds']} seeds: "
            "mean ± deviation, percent"
        )
        draw = functools.partial(draw_comparison, summary)
        parts.append(table(caption, ["method", *METRICS.values()], rows, best=True))
        parts.append(figures.add(f"comparison-{number}", draw, caption))
    return parts


def _omega(figures: Figures, data: str, models: tuple[str, ...], split: Split) -> list[str]:
    curves: dict[str, dict[float, tuple[float, float]]] = {}

    def draw(out: Path) -> None:
        curves.update(report_omega(data, models, split, picture=out))

    shown = figures.add("omega", draw, "Rank-1 and Rsum by ω")
    words = []
    for name, curve in curves.items():
        (first, (rank1, _)), (second, (_, rsum)) = (max(curve.items(), key=lambda p: p[1][i]) for i in (0, 1))
        inside = "inside the range: both similarities help" if 0 < first < 1 else "at an end: one similarity is enough"
        words.append(
            paragraph(
                f"{name}: Rank-1 peaks at ω = {first:g} ({rank1:.2f}), {inside}; Rsum at {second:g} ({rsum:.2f})."
            )
        )
    return [*words, shown]


def reranked_section(store: Store, models: tuple[str, ...], split: Split) -> list[Section]:
    """Evaluations with `--rerank-engine`, without and with re-ranking side by side; none if there are none."""
    rows = []
    for name in models:
        model = require_model(store, name)
        for file in store.names(EVALUATIONS, model.digest):
            if not re.fullmatch(rf"{split}-.*by-.*\.json", file):
                continue
            result: dict[str, Any] = store.read_json(EVALUATIONS, model.digest, file) or {}
            how, metrics = result["reranking"], result["metrics"]
            pairs = [f"{metrics['fused'][key]:.2f} → {metrics['reranked'][key]:.2f}" for key in RERANKED]
            p = [f"{how['differences'][figure]['p']:.4f}" for figure in ("Rank-1", "AP")]
            cost = [f"{how['questions'] / result['queries']:.1f}", f"{how['engine_seconds_per_query']:.3g}"]
            row = [model.label(name), how["engine"], str(how["images"]), f"{how['weight']:.3g}"]
            rows.append([*row, *pairs, *p, *cost])
    if not rows:
        return []
    headings = ["", "engine", "images", "weight", *(METRICS[key] for key in RERANKED), "p of Rank-1", "p of mAP"]
    words = (
        "An engine says of the first images of each sentence which of its claims they fit. The weight of its verdicts "
        "was learned on the validation split; 0 means that they gained nothing there. The p-values are those of a "
        "paired bootstrap over the people described."
    )
    caption = f"Split {split}, fused → re-ranked, percent; questions and seconds of the engine are per sentence"
    return [("Re-ranking by an engine", [paragraph(words), table(caption, [*headings, "questions", "seconds"], rows)])]


def _confidence(figures: Figures, data: str, models: tuple[str, ...], split: Split) -> list[str]:
    found: dict[str, dict[str, Any]] = {}

    def draw(out: Path) -> None:
        found.update(report_confidence(data, models, split, picture=out))

    caption = (
        "Left: confidence in first hits, and how many are right. Right: people identified, by the share of false alarms"
    )
    shown = figures.add("confidence", draw, caption)
    words = (
        "Each sentence is asked of the whole gallery, and of the gallery without the images of its person. A false "
        "alarm is a first hit for somebody who is not there, an identified person is right at rank 1."
    )
    parts = [paragraph(words)]
    rows = [
        [name, *(f"{100 * value:.1f}" for value in (rate["false_alarms"], rate["identified"]))]
        for name, figure in found.items()
        for rate in figure["rates"]
        if rate["identified"] is not None
    ]
    parts.append(table("By similarity, percent", ["", "false alarms", "identified"], rows))
    rows = [
        [name, f"{100 * rate['chosen_for']:g}", f"{rate['min_confidence']:.3f}"]
        + [f"{100 * rate[key]:.1f}" for key in ("false_alarms", "identified")]
        for name, figure in found.items()
        for rate in figure.get("confidence", {}).get("rates", [])
    ]
    if rows:
        headings = ["", "chosen for", "min_confidence", "false alarms", "identified"]
        parts.append(table("By the confidence chosen on the validation split, percent", headings, rows))
    return [*parts, shown]


def _ranked(
    figures: Figures, data: str, models: tuple[str, ...], split: Split, omega: float | None, seed: int
) -> list[str]:
    words = "A green frame marks the person described."
    if len(models) == 2:
        words = (
            f"The same sentences for {models[0]} and {models[1]}, chosen at random: first sentences that exactly one "
            "of the two models answers right at rank 1, then others. " + words
        )

    def draw(out: Path) -> None:
        report_ranked(data, models, split, omega=omega, seed=seed, picture=out)

    return [paragraph(words), figures.add("ranked", draw, "Ranked lists", photographs=True)]


def _attributes(figures: Figures, store: Store, model: str, split: Split, omega: float | None) -> list[Section]:
    if store.belonging("attributes", store.current("images", "ingest")) is None:
        return []
    words = (
        f"Errors of {model}. If an attribute's bar ends near the mark of random people, the model does not look at "
        "this attribute; if the bar is short, the attribute is right even if the person is wrong."
    )

    def draw(out: Path) -> None:
        report_attributes(store.uri, model, split, omega=omega, picture=out)

    return [("Errors by attribute", [paragraph(words), figures.add("attributes", draw, "Errors by attribute")])]


def _training(figures: Figures, store: Store, models: tuple[str, ...]) -> list[str]:
    trained = tuple(name for name in models if "history" in require_model(store, name).training)
    if not trained:
        return [paragraph("These models were not trained here.")]

    def draw(out: Path) -> None:
        report_training(store.uri, trained, picture=out)

    words = []
    for name in trained:
        published = require_model(store, name)
        cut = published.training.get("texts_cut", {})
        shares = ", ".join(f"{share:.1%} of {texts}" for texts, share in cut.items())
        if cut:
            words.append(paragraph(f"{name} reads {published.context} tokens of a text; longer, and cut: {shares}."))
    return [*words, figures.add("training", draw, "Loss by step and validation by epoch")]


def _dataset(figures: Figures, store: Store, data: str) -> list[str]:
    counts: dict[str, list[int]] = {}

    def draw(out: Path) -> None:
        counts.update(report_statistics(data, picture=out))

    shown = figures.add("statistics", draw, "Images of a person, words of a caption, tokens of a summary")
    rows = [[split, *(f"{number:,}" for number in numbers)] for split, numbers in counts.items()]
    reasons = Counter((row["stage"], row["reason"]) for row in store.rejects().to_pylist())
    rejected = [[stage, reason, f"{count:,}"] for (stage, reason), count in sorted(reasons.items())]
    parts = [table("Size", ["split", "people", "images", "captions"], rows), shown]
    if rejected:
        parts.append(table("Rows that a stage could not use", ["stage", "reason", "rows"], rejected))
    return parts


def _samples(figures: Figures, store: Store, data: str, seed: int) -> list[Section]:
    if store.manifest("dialogues") is None:
        return []
    out = figures.folder / "samples.png"  # there is no SVG of it
    report_dialogues((data,), out, seed=seed)
    return [("Images, captions and summaries", [picture(out, "Images with their caption and summary")])]
