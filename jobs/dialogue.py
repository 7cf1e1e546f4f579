"""Dialogue: a model is asked about every image and summarises it (Conversation Attribute Mining) → table dialogues.

    python jobs/dialogue.py --data s3://bucket/cuhk --engine vllm --vllm.model Qwen/Qwen2-VL-7B-Instruct

Each worker holds one engine and keeps many conversations in flight. `--only-missing` asks about images that the
published table lacks. `--published FILE` imports the authors' published dialogues instead of asking. `--agree` then
writes common summaries of images that are known to show one person.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ceca.commandline import parse_arguments
from ceca.config import DialogueConfig
from ceca.data.groups import find_groups
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import Manifest, Receipt, Store, version_of
from ceca.data.tables import Images, find_images
from ceca.dialogue.attributes import oracle_attributes, read_vocabulary
from ceca.dialogue.conversation import PROMPT_VERSION
from ceca.settings import to_mapping
from jobs.dialogues.authors import import_published
from jobs.dialogues.common import run_own, write_common
from jobs.dialogues.engine import engine_workers
from jobs.dialogues.missing import deciding_settings, missing_images
from jobs.dialogues.report import print_report, progress_words
from jobs.dialogues.worker import DialogueWorker
from jobs.runtime.console import console, entry
from jobs.runtime.records import Units, ranges
from jobs.runtime.units import Plan

CANARIES = 4  # images whose answers are compared before the work starts


def dialogue(data: str, config: DialogueConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish the table dialogues for the images of a dataset.

    Args:
        data: dataset URI.
        config: the engine, the questions and the images.
        redo: make a new version even if this one is published.

    Returns:
        The manifest of the table.

    Raises:
        UserError: the oracle has no attributes to read, `only_missing` would mix answers of two kinds, or no two images
            are known to show one person whose summaries shall agree.
    """
    store = Store(data)
    images = store.current("images", "ingest")
    if config.agree == "none":
        return _describe(store, config, images, redo=redo)
    everything = find_images(store, images)
    groups = find_groups(store, everything, config.agree)  # may refuse, so before the work
    told = _describe(store, config, images, redo=redo)
    return write_common(store, config, told["dialogues"], everything, groups)


def _describe(store: Store, config: DialogueConfig, images: Manifest, *, redo: bool) -> dict[str, Manifest]:
    """The table of dialogues; if summaries shall agree, it may have common ones already."""
    asked = find_images(store, images, config.split).take(slice(config.limit))
    if config.published is not None:
        return import_published(store, config, asked, redo=redo)
    made_from = {"images": images.version}
    if config.engine == "oracle":
        made_from["attributes"] = oracle_attributes(store, images).version
        console.print(
            f"dialogue: the oracle is a simulated annotator that knows the truth and errs in "
            f"{config.oracle.error_rate:.0%} of attributes; its summaries say nothing about a multimodal model"
        )
    kept: list[Receipt] = []
    if config.only_missing:
        earlier = store.current("dialogues")
        asked = missing_images(store, earlier, asked, to_mapping(config, results_only=True))
        if not len(asked) and earlier.made_from.get("images") == images.version:
            console.print(f"dialogue: no image lacks one in {store.place('dialogues')}")
            return {"dialogues": earlier}
        made_from["dialogues"] = earlier.version
        kept = [Receipt({"dialogues": part}) for part in earlier.parts]
    plan = _plan(store, config, asked, made_from, kept)
    workers = engine_workers(config, config.images_per_part)
    manifests = run_own(store, plan, workers, config, redo=redo)
    print_report(manifests["dialogues"], workers.gpus)
    return manifests


def _plan(
    store: Store,
    config: DialogueConfig,
    images: Images,
    made_from: dict[str, str],
    kept: Sequence[Receipt],
) -> Plan:
    """The units of work that ask about these images."""
    vocabulary = read_vocabulary(store, images.table)
    choices = vocabulary if config.attributes else None
    settings = to_mapping(dataclasses.replace(config, agree="none"), results_only=True)
    checked = CANARIES if config.canary and config.engine != "oracle" else 0
    canaries = images.rows[:: max(1, len(images) // CANARIES)][:checked]
    units = Units(config.images_per_part, images=images.rows)
    arguments: dict[str, Any] = {
        "uri": store.uri,
        "images": images.table,
        "config": to_mapping(config),
        "vocabulary": vocabulary,
        "choices": choices,
        "canaries": {"images": ranges(canaries)},
    }
    return Plan(
        stage="dialogue",
        version=version_of("dialogue", SCHEMA_VERSION, PROMPT_VERSION, made_from, deciding_settings(settings), choices),
        tables=("dialogues",),
        units=units,
        sizes=units.sizes,
        worker=DialogueWorker,
        arguments=arguments,
        made_from=made_from,
        config=settings,
        kept=kept,
        notes={"prompt_version": PROMPT_VERSION},
        progress=progress_words,
        again="--only-missing asks about them alone",
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("dialogue", argv, prog="dialogue")
    dialogue(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
