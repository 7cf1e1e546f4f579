"""Search a published gallery from the shell, in this process: no cluster, no server.

ceca search "a woman in a red coat" --data s3://bucket/cuhk --picture answer.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ceca.data.store import Store
from ceca.errors import UserError
from jobs.runtime.console import console, entry, text_table


def search(
    query: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="the person in words")],
    data: Annotated[str, tyro.conf.arg(help="dataset URI with a gallery")],
    model: Annotated[str, tyro.conf.arg(help="name or URI; default: the model that made the gallery")] = "",
    top_k: Annotated[int, tyro.conf.arg(help="number of hits")] = 10,
    omega: Annotated[float, tyro.conf.arg(help="share of the local similarity, 0 to 1")] = 0.3,
    neighbours: Annotated[
        int, tyro.conf.arg(help="number of nearest images averaged into each gallery embedding; 0 is off")
    ] = 0,
    rerank: Annotated[
        int, tyro.conf.arg(help="number of best images ranked again by similarity to the first five; 0 is off")
    ] = 0,
    approximate: Annotated[
        float, tyro.conf.arg(help="share of the images compared exactly, e.g. 0.005, which may miss some; 0 is exact")
    ] = 0.0,
    where: Annotated[
        tuple[str, ...], tyro.conf.arg(help="conditions on the images: camera=c1,c2 hat=cap split=test")
    ] = (),
    min_confidence: Annotated[
        float, tyro.conf.arg(help="least probability, 0 to 1, that the first hit shows this person; else no hits")
    ] = 0.0,
    picture: Annotated[Path | None, tyro.conf.arg(help="also write the hits as a picture")] = None,
) -> None:
    """Find the images of a person from a description."""
    if not query.strip():
        raise UserError("the query is empty: describe the person in words")
    if top_k < 1 or not 0 <= omega <= 1 or neighbours < 0 or rerank < 0:
        raise UserError(
            "--top-k must be at least 1, --omega between 0 and 1, --neighbours and --rerank not negative, "
            f"found {top_k}, {omega}, {neighbours} and {rerank}"
        )
    for option, share in (("--min-confidence", min_confidence), ("--approximate", approximate)):
        if not 0 <= share <= 1:
            raise UserError(f"{option} must be between 0 and 1, found {share}")
    from ceca.search.catalogue import Catalogue
    from ceca.search.confidence import require_confidence
    from ceca.search.facets import parse_conditions
    from ceca.search.searcher import Searcher
    from jobs.reports.hits import ranked_list

    searcher = Searcher(Store(data), model, neighbours=neighbours, approximate=approximate)
    if min_confidence:
        require_confidence(None if rerank else searcher.calibration, omega)
    conditions = parse_conditions(where)
    hits = searcher.search(query, omega=omega, top_k=top_k, where=conditions, rerank_first=rerank)
    if not hits:
        console.print("search: no image meets all conditions")
        return
    confidence = None if rerank else searcher.confidence(hits, omega, conditions)
    if confidence is not None and confidence < min_confidence:
        console.print(
            f"search: probably nobody: the first hit has confidence {confidence:.2f}, below {min_confidence:g}"
        )
        return
    catalogue = Catalogue(searcher.edition)
    notes = [] if confidence is None else [f"confidence {confidence:.2f}"]
    notes += ["approximate"] if approximate else []
    title = f"{query} ({', '.join(notes)})" if notes else query
    table = text_table(title, "", "similarity", "global", "local", "identity", "image", left="image")
    paths = catalogue.source_paths([hit.image_id for hit in hits])
    for rank, (hit, path) in enumerate(zip(hits, paths, strict=True), 1):
        figures = (f"{value:.3f}" for value in (hit.similarity, hit.global_similarity, hit.local_similarity))
        table.add_row(str(rank), *figures, str(hit.identity), path or "")
    console.print(table)
    if picture is not None:
        from ceca.report.figures import draw_ranked_lists

        draw_ranked_lists([ranked_list(catalogue, query, None, hits)], picture)
        console.print(f"search: → {picture}")


def main(argv: list[str] | None = None) -> None:
    tyro.cli(search, args=argv, prog="ceca search")


if __name__ == "__main__":
    entry(main)
