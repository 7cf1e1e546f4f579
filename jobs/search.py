"""Search a published gallery from the shell, in this process: no cluster, no server.

ceca search "a woman in a red coat" --data s3://bucket/cuhk --picture answer.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table as TextTable

from ceca.data.store import Store
from ceca.data.tables import list_images
from ceca.datasets.images import open_image
from ceca.errors import UserError
from ceca.report.figures import RankedList, draw_ranked_lists
from ceca.search.catalogue import Catalogue
from ceca.search.edition import Edition
from ceca.search.facets import parse_conditions
from ceca.search.ranking import Hit
from ceca.search.searcher import Searcher
from jobs.runtime.console import console, entry


def search(
    query: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="the person in words")],
    data: Annotated[str, tyro.conf.arg(help="dataset URI with a gallery")],
    model: Annotated[str, tyro.conf.arg(help="name or URI; default: the one that made the gallery")] = "",
    top_k: int = 10,
    omega: Annotated[float, tyro.conf.arg(help="share of the local similarity, 0 to 1")] = 0.3,
    neighbours: Annotated[int, tyro.conf.arg(help="nearest images that lend an image their embeddings")] = 0,
    rerank: Annotated[int, tyro.conf.arg(help="best images that are ranked again by the first five of them")] = 0,
    where: Annotated[tuple[str, ...], tyro.conf.arg(help="only such images: camera=c1,c2 hat=cap split=test")] = (),
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
    searcher = Searcher(Store(data), model, neighbours=neighbours)
    hits = searcher.search(query, omega=omega, top_k=top_k, where=parse_conditions(where), rerank_first=rerank)
    if not hits:
        console.print("search: no image fulfils all conditions")
        return
    paths = find_paths(searcher.edition, hits)
    table = TextTable(title=query, title_justify="left")
    for heading in ("", "similarity", "global", "local", "identity", "image"):
        table.add_column(heading, justify="left" if heading == "image" else "right")
    for rank, (hit, path) in enumerate(zip(hits, paths, strict=True), 1):
        figures = (f"{value:.3f}" for value in (hit.similarity, hit.global_similarity, hit.local_similarity))
        table.add_row(str(rank), *figures, str(hit.identity), path)
    console.print(table)
    if picture is not None:
        draw_ranked_lists([ranked_list(Catalogue(searcher.edition), query, None, hits)], picture)
        console.print(f"search: → {picture}")


def find_paths(edition: Edition, hits: Sequence[Hit]) -> list[str]:
    """Where the images came from, in the order of the hits."""
    paths = {row.image_id: row.source_path for row in list_images(edition.store, edition.manifest("images"))}
    for table in edition.read_added(["image_id", "source_path"]):
        paths |= dict(zip(table["image_id"].to_pylist(), table["source_path"].to_pylist(), strict=True))
    return [paths[hit.image_id] for hit in hits]


def ranked_list(catalogue: Catalogue, query: str, identity: int | None, hits: Sequence[Hit]) -> RankedList:
    """Hits with their pictures."""
    pictures = [catalogue.picture(hit.image_id) for hit in hits]
    shown = [open_image(picture.content) for picture in pictures if picture is not None]
    return RankedList(query, identity, shown, [hit.identity for hit in hits])


def main(argv: list[str] | None = None) -> None:
    tyro.cli(search, args=argv, prog="ceca search")


if __name__ == "__main__":
    entry(main)
