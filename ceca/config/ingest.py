"""Settings of `draw` and `ingest`."""

from __future__ import annotations

from typing import Literal

from ceca.settings import NonNegative, Positive, PositiveFloat, Share, added, config, execution

Split = Literal["train", "val", "test"]


@config
class DrawConfig:
    """Draw pedestrians: a deterministic synthetic benchmark in one of the published layouts."""

    seed: NonNegative = 0
    """Seed of all random choices."""
    identities: Positive = 360
    """Number of people."""
    images_per_identity: Positive = 4
    """Number of images of each person."""
    layout: Literal["cuhk_pedes", "icfg_pedes", "rstpreid"] = "cuhk_pedes"
    """Benchmark whose annotation file and folders are imitated."""
    split_identities: tuple[int, int, int] | None = None
    """Number of people in train, val and test; none means about 70, 10 and 20 %."""
    level: Literal["easy", "medium", "hard"] = added("easy")
    """Difficulty. `medium` and `hard` have tracklets, cameras with their own light, and people who are alike in all but
    one or two attributes. Some captions are wrong or long. Some people of test have no caption."""
    lookalike_share: Share | None = None
    """Share of people, 0 to 1, who differ from another person in only two or three attributes, one or two above the
    level easy; none takes the level's (0.3, 0.5, 0.7)."""
    workers: Positive | None = execution(None)
    """Number of drawing processes; none means one per CPU."""


Source = Literal[
    "auto",
    "cuhk_pedes",
    "icfg_pedes",
    "rstpreid",
    "ufine6926",
    "synth_pedes",
    "mals",
    "aptm",
    "luperson_mllm",
    "iiitd_20k",
    "folder",
    "table",
    "webdataset",
    "huggingface",
    "lance",
]


@config
class IngestConfig:
    """Read images, and what is known of them, into the tables `images` and `captions`."""

    source: str = ""
    """Folder, file or URI: a published layout, a folder of pictures, tables (CSV, JSON, Parquet), WebDataset tar files,
    a dataset that Hugging Face's library saved, or Lance datasets."""
    layout: Source = "auto"
    """Form of the source; `auto` finds it by what lies there."""
    columns: tuple[str, ...] = added(())
    """Columns of a table, such as image=file identity=pid text=caption split=set camera=cam time=ts tracklet=track.
    Columns with usual names need none, `camera=` leaves one out, and text=a,b takes the captions from two."""
    images: str = execution("")
    """Folder of the images that a table names; empty means the table's own."""
    split_share: tuple[Share, Share, Share] | None = added(None)
    """Shares of train, val and test, such as 0.8 0.1 0.1, of people without a split; none puts them into test."""
    only_missing: bool = added(False)
    """Read only images that the published table lacks, by their path, and publish old and new ones together."""
    images_per_part: Positive = 1024
    """Images per Parquet file; with pedestrian crops of 5-30 kB a file stays far below 128 MB."""
    limit: Positive | None = None
    """Read only this number of records, from the first; none means all."""
    cpus_per_task: PositiveFloat = execution(1.0)
    """CPUs that Ray reserves for each task."""

    def __post_init__(self) -> None:
        if self.split_share is not None and abs(sum(self.split_share) - 1) > 1e-6:
            raise ValueError(f"the three shares of split_share must sum to 1, found {self.split_share}")
