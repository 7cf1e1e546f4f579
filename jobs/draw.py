"""Draw: a folder of drawn pedestrians in a published layout, ready for ingest.

    python jobs/draw.py --data build/drawn --identities 360

The images are drawn on this machine; if the folder is a URI (s3://…), they are then copied there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from ceca.commandline import parse_arguments
from ceca.config import DrawConfig
from ceca.data.store import filesystem
from ceca.datasets.drawn import DrawnStatistics, draw_dataset
from ceca.errors import UserError
from jobs.runtime.console import Track, console, entry


def draw(folder: str, config: DrawConfig) -> DrawnStatistics:
    """Draw the images that a dataset lacks; a complete folder stays as it is.

    Args:
        folder: path or URI.
        config: number of people and images, layout and seed.

    Raises:
        UserError: the settings do not fit together.
    """
    fs, root = filesystem(folder)
    if isinstance(fs, LocalFileSystem):
        return _draw(Path(root), config, folder)
    with tempfile.TemporaryDirectory(prefix="ceca-draw-") as place:
        statistics = _draw(Path(place), config, folder)
        if folder.startswith("s3://") and not fs.exists(root.split("/")[0]):
            fs.mkdir(root.split("/")[0])
        files = [path for path in Path(place).rglob("*") if path.is_file()]
        fs.put([str(file) for file in files], [f"{root}/{file.relative_to(place).as_posix()}" for file in files])
    return statistics


def _draw(folder: Path, config: DrawConfig, shown: str) -> DrawnStatistics:
    with Track("draw", config.identities * config.images_per_identity, unit="images") as track:
        try:
            statistics = draw_dataset(
                folder,
                seed=config.seed,
                identities=config.identities,
                images_per_identity=config.images_per_identity,
                layout=config.layout,
                split_identities=config.split_identities,
                level=config.level,
                lookalike_share=config.lookalike_share,
                workers=config.workers,
                progress=lambda done, _: track.advance(done - track.finished),
            )
        except ValueError as error:
            raise UserError(str(error)) from error
    images = ", ".join(f"{count:,} {split}" for split, count in statistics.images.items())
    console.print(f"draw: {images} images, {statistics.captions:,} captions → {shown}")
    return statistics


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("draw", argv, prog="draw")
    draw(arguments.data, arguments.config)


if __name__ == "__main__":
    entry(main)
