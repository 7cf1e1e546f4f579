"""Draw: a folder of drawn pedestrians in a published layout, ready for ingest.

    python jobs/draw.py --data build/drawn --identities 360

Runs on this machine alone; the folder is local.
"""

from __future__ import annotations

from pathlib import Path

from ceca.commandline import parse_arguments
from ceca.config import DrawConfig
from ceca.datasets.drawn import DrawnStatistics, draw_dataset
from ceca.errors import UserError
from jobs import stages


def draw(folder: str, config: DrawConfig) -> DrawnStatistics:
    """Draw what is missing of a dataset; a folder that is complete stays as it is."""
    if "://" in folder:
        raise UserError(f"pedestrians are drawn into a local folder, not {folder}; ingest takes them to the store")
    with stages.Track("draw", config.identities * config.images_per_identity, unit="images") as track:
        try:
            made = draw_dataset(
                Path(folder),
                seed=config.seed,
                identities=config.identities,
                images_per_identity=config.images_per_identity,
                layout=config.layout,
                split_identities=config.split_identities,
                lookalike_share=config.lookalike_share,
                workers=config.workers,
                progress=lambda done, _: track.advance(done - track.finished),
            )
        except ValueError as error:
            raise UserError(str(error)) from error
    images = ", ".join(f"{count:,} {split}" for split, count in made.images.items())
    stages.console.print(f"draw: {images} images, {made.captions:,} captions → {folder}")
    return made


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("draw", argv, prog="draw")
    draw(arguments.data, arguments.config)


if __name__ == "__main__":
    stages.entry(main)
