"""Import of the dialogues that the authors publish, instead of asking a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pyarrow as pa

from ceca.config import DialogueConfig
from ceca.data.schema import DIALOGUES, SCHEMA_VERSION
from ceca.data.store import Manifest, Reject, Store, filesystem, version_of
from ceca.data.tables import ImageRow
from ceca.dialogue.authors import DialogueFormatError, PublishedDialogue, read_published
from ceca.errors import UserError
from ceca.model.tokens import CONTEXT, count_tokens
from ceca.settings import to_mapping
from jobs.runtime.units import Output, Plan, run_plan


def import_published(
    store: Store, config: DialogueConfig, images: Manifest, rows: list[ImageRow], *, redo: bool
) -> dict[str, Manifest]:
    """Publish the table dialogues from the file that `config.published` names, for these images."""
    assert config.published is not None
    fs, path = filesystem(config.published)
    try:
        content = fs.cat_file(path)
        found, unusable = read_published(content)
    except FileNotFoundError:
        raise UserError(f"no file of published dialogues at {config.published}") from None
    except DialogueFormatError as error:
        raise UserError(f"{config.published}: {error}") from None
    digest = hashlib.sha256(content).hexdigest()
    by_path = {row.source_path: row.image_id for row in rows}
    known = {made.path for made in found}
    strangers = [
        Reject(made.path, "unknown_image", "no such image in this dataset")
        for made in found
        if made.path not in by_path
    ]
    without = [
        Reject(row.image_id, "not_in_file", f"{row.source_path} has no dialogue")
        for row in rows
        if row.source_path not in known
    ]
    entries = [[by_path[made.path], dataclasses.asdict(made)] for made in found if made.path in by_path]
    units = [
        entries[start : start + config.images_per_part] for start in range(0, len(entries), config.images_per_part)
    ]
    made_from = {"images": images.version, "published": digest}
    plan = Plan(
        stage="dialogue",
        version=version_of("dialogue", SCHEMA_VERSION, made_from, config.split, config.limit),
        tables=("dialogues",),
        units=units,
        sizes=[len(unit) for unit in units],
        worker=ImportWorker,
        arguments={"source": config.published},
        made_from=made_from,
        config=to_mapping(config, results_only=True),
        rejects=[*unusable, *strangers, *without],
    )
    return run_plan(store, plan, redo=redo, replicas=config.replicas, cpus=1)


class ImportWorker:
    """Turns published dialogues into rows."""

    def __init__(self, source: str):
        self.source = source

    def __call__(self, work: list[Any]) -> Output:
        rows = []
        for image_id, entry in work:
            made = PublishedDialogue(**entry)
            turns = [{"question": question, "answer": answer} for question, answer in made.turns]
            rows.append(
                {
                    "image_id": image_id,
                    "turns": turns,
                    "summary": made.summary,
                    "attributes": {},
                    "flags": [],
                    "model": "published",
                    "prompt_version": "published",
                    "generation_settings": json.dumps({"source": self.source}),
                    "prompt_tokens": 0,
                    "cached_tokens": 0,
                    "completion_tokens": 0,
                }
            )
        counts = {"summaries_over_77_tokens": sum(count_tokens(row["summary"]) > CONTEXT for row in rows)}
        return Output({"dialogues": pa.Table.from_pylist(rows, DIALOGUES)}, counts=counts)
