"""Export: ways out of the tables, into what other programs read.

ceca export trec --data s3://bucket/cuhk --model ceca-vitb16 --out trec
ceca export webdataset --data s3://bucket/cuhk --out s3://bucket/cuhk-tar
ceca export huggingface --data s3://bucket/cuhk --out cuhk-parquet
ceca export lance --data s3://bucket/cuhk --out cuhk.lance
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import tyro

from ceca.config import EvaluateConfig, Split
from ceca.data.store import Store
from ceca.errors import UserError
from jobs.runtime.console import Track, console, entry

Data = Annotated[str, tyro.conf.arg(help="dataset URI: a folder, file://… or s3://bucket/prefix")]
Out = Annotated[str, tyro.conf.arg(help="folder or URI that is written to")]


def export_trec(
    data: Data,
    out: Out,
    model: Annotated[str, tyro.conf.arg(help="name below the dataset URI, or a URI of its own")] = "ceca",
    split: Annotated[Split, tyro.conf.arg(help="split whose captions ask for its images")] = "test",
    omega: Annotated[float, tyro.conf.arg(help="share of the local similarity, 0 to 1")] = 0.3,
    top_k: Annotated[int, tyro.conf.arg(help="images per query in the run")] = 1000,
) -> None:
    """Write a model's evaluation as TREC's files: <model>-<split>.run, <split>.qrels, and <split>.queries.tsv."""
    from ceca.evaluation.evaluation import embedded_sides
    from ceca.evaluation.trec import qrel_lines, run_lines
    from jobs.evaluations.embedding import embed_split

    if top_k < 1:
        raise UserError(f"--top-k must be at least 1, found {top_k}")
    store, target = Store(data), Store(out)
    config = EvaluateConfig(model=model, split=split, omega=omega)
    queries, gallery = embed_split(store, config)
    texts, images = embedded_sides(config, queries, gallery)
    captions, documents = queries["caption_id"].to_pylist(), gallery["image_id"].to_pylist()
    name = model.rstrip("/").rsplit("/", 1)[-1].replace(" ", "_")
    run = run_lines(texts, images, captions, documents, omega=omega, top_k=top_k, tag=name)
    target.write_bytes("".join(run).encode(), f"{name}-{split}.run")
    target.write_bytes("".join(qrel_lines(texts, images, captions, documents)).encode(), f"{split}.qrels")
    words = store.read(store.captions(store.current("images", "ingest")), ["caption_id", "text"])
    asked = dict(zip(words["caption_id"].to_pylist(), words["text"].to_pylist(), strict=True))
    lines = (f"{caption}\t{' '.join(asked.get(caption, '').split())}\n" for caption in captions)
    target.write_bytes("".join(lines).encode(), f"{split}.queries.tsv")
    console.print(
        f"export: {len(captions):,} queries, {len(documents):,} images → {target.place(f'{name}-{split}.run')}"
    )


def export_webdataset(
    data: Data,
    out: Out,
    split: Annotated[Split | None, tyro.conf.arg(help="only images of this split; none means all")] = None,
    images_per_file: Annotated[int, tyro.conf.arg(help="images in a tar file")] = 1000,
) -> None:
    """Write the images, with their captions and all that is known of them, as WebDataset tar files."""
    from ceca.data.webdataset import write_shards

    _write_files(write_shards, data, out, split, images_per_file, "tar files")


def export_huggingface(
    data: Data,
    out: Out,
    split: Annotated[Split | None, tyro.conf.arg(help="only images of this split; none means all")] = None,
    images_per_file: Annotated[int, tyro.conf.arg(help="images in a file")] = 1000,
) -> None:
    """Write the images, with their captions and all that is known of them, as Hugging Face's `datasets` loads them:
    Parquet files of each split, and a card."""
    from ceca.data.huggingface import write_parquet

    _write_files(write_parquet, data, out, split, images_per_file, "Parquet files and README.md")


def export_lance(
    data: Data,
    out: Out,
    split: Annotated[Split | None, tyro.conf.arg(help="only images of this split; none means all")] = None,
    images_per_file: Annotated[int, tyro.conf.arg(help="images in a file")] = 1000,
) -> None:
    """Write the images, with their captions and all that is known of them, as a Lance dataset."""
    from ceca.data.lance import write_lance

    _write_files(write_lance, data, out, split, images_per_file, "files")


def _write_files(
    write: Callable[..., Iterator[int]], data: str, out: str, split: Split | None, images_per_file: int, what: str
) -> None:
    """Write a dataset's images as files by a function that yields the number of images in each, and show progress."""
    if images_per_file < 1:
        raise UserError(f"--images-per-file must be at least 1, found {images_per_file}")
    store, target = Store(data), Store(out)
    total, files = store.current("images", "ingest").rows, 0
    with Track("export", total, unit="images") as track:
        for held in write(store, target, split=split, images_per_file=images_per_file):
            files += 1
            track.advance(held)
    console.print(f"export: {track.finished:,} images in {files} {what} → {target.uri}")


def main(argv: list[str] | None = None) -> None:
    kinds: dict[str, Any] = {
        "trec": export_trec,
        "webdataset": export_webdataset,
        "huggingface": export_huggingface,
        "lance": export_lance,
    }
    tyro.extras.subcommand_cli_from_dict(kinds, args=argv, prog="ceca export", description="Ways out of the tables.")


if __name__ == "__main__":
    entry(main)
