"""Evaluate: retrieval metrics of a model for global, local and fused similarity, as a table and as JSON.

    python jobs/evaluate.py --data s3://bucket/cuhk --model ceca-vitb16 --split test

Ray workers compute the embeddings, which are kept in fp32 below evaluations/: another ω needs no model. Queries are
compared with the gallery a strip at a time, on the cluster's CPUs if there are many.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ceca.commandline import parse_arguments
from ceca.config import EvaluateConfig
from ceca.data.names import EVALUATIONS
from ceca.data.store import Store
from ceca.evaluation.names import SIMILARITIES
from ceca.evaluation.significance import Difference
from ceca.model.registry import require_model
from ceca.search.confidence import CALIBRATED_ON, read_calibration
from ceca.settings import to_mapping
from jobs.runtime.console import console, entry, print_metrics, text_table

USUAL = 0.05  # share of false alarms that is printed


def evaluate(data: str, config: EvaluateConfig, *, redo: bool = False) -> dict[str, Any]:
    """Compute, print and store the metrics.

    Args:
        data: dataset URI.
        config: the model, the split and how queries are ranked.
        redo: embed the split again.

    Returns:
        The content of the JSON file. `metrics` has a row for text → image by each similarity, by chance, and with an
        engine `reranked`, whose weight, cost and difference from `fused` are in `reranking`;
        `image_to_text` the same for the other direction, `open_set` the figures of `ceca.evaluation.open_set`. That of
        the validation split also has the `calibration` that searches read. A table beside the file has the figures of
        every query.
    """
    from ceca.evaluation.evaluation import embedded_sides, per_query_table, result_name, summarise, texts_of
    from ceca.evaluation.open_set import Trials, calibrate, open_set
    from ceca.evaluation.statistics import share_cut
    from jobs.evaluations.embedding import embed_split
    from jobs.evaluations.ranking import rank
    from jobs.evaluations.reranking import rerank_split

    store = Store(data)
    queries, gallery = embed_split(store, config, redo=redo)
    model = require_model(store, config.model)
    omega = model.omega(config.omega)
    texts, images = embedded_sides(dataclasses.replace(config, omega=omega), queries, gallery)
    omegas = dict(zip(SIMILARITIES, (0.0, 1.0, omega), strict=True))
    by_omega = rank(texts, images, sorted(set(omegas.values())), config.rerank)
    figures = {similarity: by_omega[omega] for similarity, omega in omegas.items()}
    reranking: dict[str, Any] = {}
    if config.rerank_engine is not None:
        figures["reranked"], reranking = rerank_split(
            store, config, omega, (queries, gallery), (texts, images), figures["fused"]
        )
    by_omega = rank(images, texts, sorted(set(omegas.values())))
    reverse_figures = {similarity: by_omega[omega] for similarity, omega in omegas.items()}
    result: dict[str, Any] = {
        "model": config.model,
        "model_digest": model.digest,
        "split": config.split,
        "protocol": model.protocol,
        "omega": omega,
        "neighbours": config.neighbours,
        "rerank": config.rerank,
        "queries": len(texts.identities),
        "gallery": len(images.identities),
        "metrics": summarise(figures, texts, images),
        "image_to_text": summarise(reverse_figures, images, texts),
        "made_from": model.made_from,
        "config": to_mapping(config),
    }
    if reranking:
        result["reranking"] = reranking
    # These change similarities; a search with them has no confidence.
    if not (config.neighbours or config.rerank or config.rerank_engine):
        trials, total = Trials.of(figures["fused"]), len(images.identities)
        if config.split == CALIBRATED_ON:
            calibration = calibrate(trials, omega, total)
            result |= {"calibration": dataclasses.asdict(calibration), "open_set": open_set(trials, total, calibration)}
        else:
            kept = read_calibration(store, model.digest)
            result["open_set"] = open_set(trials, total, kept if kept is not None and kept.fits(omega) else None)
    name = result_name(config)
    captions = store.read(store.captions(store.current("images", "ingest")), ["caption_id", "text"])
    asked = [text or "" for text in texts_of(queries, captions)]
    result |= {"context": model.context, "queries_cut": share_cut(asked, model.context)}
    content = per_query_table(queries, captions, figures)
    store.write_bytes(content, EVALUATIONS, model.digest, f"{name}.queries.parquet")
    store.write_json(result, EVALUATIONS, model.digest, f"{name}.json")
    size = f"{result['queries']:,} queries, {result['gallery']:,} images"
    measured = f"ω {omega:g}, protocol {model.protocol}"
    print_metrics(f"{config.model} on {config.split}, text to image: {size}; {measured}", result["metrics"])
    print_metrics(f"{config.model} on {config.split}, image to text; {measured}", result["image_to_text"])
    if result["queries_cut"]:
        console.print(f"evaluate: {result['queries_cut']:.1%} of queries are longer than {result['context']} tokens")
    _print_open_set(result)
    if reranking:
        _print_reranking(reranking)
    console.print(f"evaluate: → {store.place(EVALUATIONS, model.digest, f'{name}.json')}")
    return result


def _print_open_set(result: dict[str, Any]) -> None:
    """Print how many are identified while 5 % of the searches for absent people name somebody."""
    figures = result.get("open_set", {})
    for rate in figures.get("rates", []):
        if rate["false_alarms"] == USUAL and rate["identified"] is not None:
            console.print(f"evaluate: {USUAL:.0%} false alarms leave {rate['identified']:.1%} identified (open set)")
    for rate in figures.get("confidence", {}).get("rates", []):
        if rate["chosen_for"] == USUAL:
            console.print(
                f"evaluate: min_confidence {rate['min_confidence']:.3g}, chosen for {USUAL:.0%} on {CALIBRATED_ON}: "
                f"{rate['false_alarms']:.1%} false alarms, {rate['identified']:.1%} identified"
            )


def _print_reranking(reranking: dict[str, Any]) -> None:
    """Print what re-ranking by the engine gives, and what it costs."""
    title = f"re-ranked minus fused, {reranking['engine']}, weight {reranking['weight']:.3g} learned on {CALIBRATED_ON}"
    shown = text_table(title, "", "difference", "95 % interval", "p")
    for label, difference in reranking["differences"].items():
        shown.add_row(label, *Difference(**difference).cells())
    console.print(shown)
    console.print(
        f"evaluate: the engine was asked for {reranking['queries_asked']:,} queries: {reranking['questions']:,} "
        f"questions, {reranking['different_questions']:,} of them different, "
        f"{reranking['engine_seconds_per_query']:.3g} s of the engine per query"
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("evaluate", argv, prog="evaluate")
    evaluate(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
