"""Settings of `draw` and `ingest`."""

from __future__ import annotations

from typing import Literal

from ceca.settings import NonNegative, Positive, PositiveFloat, Share, config, execution

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
    lookalike_share: Share = 0.3
    """Share of people, 0 to 1, who differ from another person in only two or three attributes."""
    workers: Positive | None = execution(None)
    """Number of drawing processes; none means one per CPU."""


@config
class IngestConfig:
    """Read a published layout (annotation file and imgs/) into the tables `images` and `captions`."""

    source: str = ""
    """Folder or URI that holds the annotation file and imgs/."""
    layout: Literal["auto", "cuhk_pedes", "icfg_pedes", "rstpreid"] = "auto"
    """Benchmark layout of the source; `auto` detects it by the annotation file."""
    images_per_part: Positive = 1024
    """Images per Parquet file; with pedestrian crops of 5-30 kB a file stays far below 128 MB."""
    limit: Positive | None = None
    """Read only this number of records, from the first; none means all."""
    cpus_per_task: PositiveFloat = execution(1.0)
    """CPUs that Ray reserves for each task."""
