"""Import of the dialogues that the authors published, instead of asking a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pyarrow as pa

from ceca.config import DialogueConfig
from ceca.data.schema import DIALOGUES, SCHEMA_VERSION
from ceca.data.store import Manifest, Reject, Store, filesystem, version_of
from ceca.data.tables import ImageRow, Images, find_images, list_images
from ceca.dialogue.authors import DialogueFormatError, PublishedDialogue, match_paths, read_published
from ceca.errors import UserError
from ceca.model.tokens import CONTEXT, count_tokens
from ceca.settings import to_mapping
from jobs.dialogues.common import run_own
from jobs.runtime.records import cut, from_json, to_json
from jobs.runtime.units import Output, Plan, Workers


@dataclasses.dataclass(frozen=True)
class ImportedRow:
    """A published dialogue and the image it belongs to."""

    image_id: str
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    summary: str


def import_published(store: Store, config: DialogueConfig, images: Images, *, redo: bool) -> dict[str, Manifest]:
    """Publish the table dialogues from the file that `config.published` names.

    Args:
        store: the dataset.
        config: settings of the stage.
        images: images that get a dialogue.
        redo: make a new version even if this one is published.

    Raises:
        UserError: the file does not exist, has another format, or a path in it could mean several images.
    """
    assert config.published is not None
    fs, path = filesystem(config.published)
    try:
        content = fs.cat_file(path)
        dialogues, unusable = read_published(content)
        everything = find_images(store, images.table)
        images_there = (row.source_path for row in list_images(store, everything))
        meant = match_paths((dialogue.path for dialogue in dialogues), images_there)
    except FileNotFoundError:
        raise UserError(f"no file of published dialogues at {config.published}") from None
    except DialogueFormatError as error:
        raise UserError(f"{config.published}: {error}") from None
    digest = hashlib.sha256(content).hexdigest()
    by_name = any(path != image for path, image in meant.items())
    dialogues = [dataclasses.replace(dialogue, path=meant.get(dialogue.path, dialogue.path)) for dialogue in dialogues]
    imported, unmatched = _match(dialogues, list_images(store, images))
    batches = cut(imported, config.images_per_part)
    made_from = {"images": images.table.version, "published": digest}
    plan = Plan(
        stage="dialogue",
        version=version_of("dialogue", SCHEMA_VERSION, made_from, config.split, config.limit, *["by name"] * by_name),
        tables=("dialogues",),
        units=[to_json(batch) for batch in batches],
        sizes=[len(batch) for batch in batches],
        worker=ImportWorker,
        arguments={"source": config.published},
        made_from=made_from,
        config=to_mapping(dataclasses.replace(config, agree="none"), results_only=True),
        rejects=[*unusable, *unmatched],
    )
    return run_own(store, plan, Workers(config.replicas, cpus=1), config, redo=redo)


def _match(dialogues: list[PublishedDialogue], rows: list[ImageRow]) -> tuple[list[ImportedRow], list[Reject]]:
    """Match dialogues with images by path; a reject for each dialogue and each image without a partner."""
    by_path = {row.source_path: row.image_id for row in rows}
    imported = [
        ImportedRow(by_path[dialogue.path], dialogue.turns, dialogue.summary)
        for dialogue in dialogues
        if dialogue.path in by_path
    ]
    rejects = [
        Reject(dialogue.path, "unknown_image", "no such image in this dataset")
        for dialogue in dialogues
        if dialogue.path not in by_path
    ]
    in_file = {dialogue.path for dialogue in dialogues}
    rejects += [
        Reject(row.image_id, "not_in_file", f"{row.source_path} has no dialogue")
        for row in rows
        if row.source_path not in in_file
    ]
    return imported, rejects


class ImportWorker:
    """Turns published dialogues into rows. A unit of work is a list of ImportedRow as JSON."""

    def __init__(self, source: str):
        self.source = source

    def __call__(self, work: list[Any]) -> Output:
        rows: list[dict[str, Any]] = [
            {
                "image_id": imported.image_id,
                "turns": [{"question": question, "answer": answer} for question, answer in imported.turns],
                "summary": imported.summary,
                "attributes": {},
                "flags": [],
                "model": "published",
                "prompt_version": "published",
                "generation_settings": json.dumps({"source": self.source}),
                "prompt_tokens": 0,
                "cached_tokens": 0,
                "completion_tokens": 0,
            }
            for imported in from_json(ImportedRow, work)
        ]
        counts = {"summaries_over_77_tokens": sum(count_tokens(row["summary"]) > CONTEXT for row in rows)}
        return Output({"dialogues": pa.Table.from_pylist(rows, DIALOGUES)}, counts=counts)
