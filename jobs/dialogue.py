"""Dialogue: every image is asked about and summarised (Conversation Attribute Mining); the answers become a table.

    python jobs/dialogue.py --data s3://bucket/cuhk --engine vllm --vllm.model Qwen/Qwen2-VL-7B-Instruct

Each worker holds one engine and keeps many conversations in flight. `--published FILE` imports dialogues that the
authors publish instead of asking.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import threading
from collections.abc import Coroutine
from typing import Any

import pyarrow as pa

from ceca.commandline import parse_arguments
from ceca.config import DialogueConfig, from_mapping, to_mapping
from ceca.dialogue.conversation import PROMPT_VERSION, Dialogue, DialogueError, Subject, converse
from ceca.dialogue.engines import generation_settings, make_engine
from ceca.dialogue.published import DialogueFormatError, PublishedDialogue, read_published
from ceca.errors import UserError
from ceca.model.backbone import CONTEXT, count_tokens
from ceca.samples import list_images
from ceca.schema import DIALOGUES, SCHEMA_VERSION
from ceca.store import Manifest, Reject, Store, filesystem, version_of
from jobs import stages


def dialogue(data: str, config: DialogueConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish the table dialogues for the images of a dataset."""
    store = Store(data)
    images = store.current("images", "ingest")
    rows = list_images(store, images, config.split)[: config.limit]
    if config.published is not None:
        return _import_published(store, config, images, redo=redo)
    vocabulary: dict[str, tuple[str, ...]] | None = None
    made_from = {"images": images.version}
    if config.engine == "oracle":
        attributes = store.manifest("attributes")
        if attributes is None:
            raise UserError(
                f"the oracle reads its answers from the attributes of drawn pedestrians, and {store.uri} has no table "
                "of attributes; choose --engine vllm or --engine openai"
            )
        made_from["attributes"] = attributes.version
        vocabulary = {name: tuple(values) for name, values in attributes.notes["vocabulary"].items()}
        stages.console.print(
            f"dialogue: the oracle is a simulated annotator that knows the truth and errs in "
            f"{config.oracle.error_rate:.0%} of attributes; its summaries say nothing about a multimodal model"
        )
    settings = to_mapping(config, results_only=True)
    # Only the chosen engine's settings decide: another engine's model name changes nothing.
    decides = {key: value for key, value in settings.items() if key not in ("vllm", "openai", "oracle")}
    decides[config.engine] = settings[config.engine]
    units = [
        [[row.part, row.row, row.image_id] for row in rows[start : start + config.images_per_part]]
        for start in range(0, len(rows), config.images_per_part)
    ]
    plan = stages.Plan(
        stage="dialogue",
        version=version_of("dialogue", SCHEMA_VERSION, PROMPT_VERSION, made_from, decides),
        tables=("dialogues",),
        units=units,
        sizes=[len(unit) for unit in units],
        worker=DialogueWorker,
        arguments={"uri": store.uri, "images": images, "config": to_mapping(config), "vocabulary": vocabulary},
        made_from=made_from,
        config=settings,
        notes={"prompt_version": PROMPT_VERSION},
    )
    gpus = config.vllm.gpus * config.vllm.tensor_parallel if config.engine == "vllm" else 0
    manifests = stages.run(store, plan, redo=redo, replicas=config.replicas, cpus=1, gpus=gpus)
    _print_counts(manifests["dialogues"])
    return manifests


class DialogueWorker:
    """Holds one engine, in an event loop of its own so that it lives from one unit to the next."""

    def __init__(self, uri: str, images: Manifest, config: dict[str, Any], vocabulary: Any):
        self.store, self.images = Store(uri), images
        self.config = from_mapping(DialogueConfig, config)
        self.settings = json.dumps(generation_settings(self.config), sort_keys=True)
        self.truth: dict[str, dict[str, str]] = {}
        if self.config.engine == "oracle":
            table = self.store.read(self.store.current("attributes", "ingest"), ["image_id", "attributes"])
            pairs = zip(table["image_id"].to_pylist(), table["attributes"].to_pylist(), strict=True)
            self.truth = {image_id: dict(attributes) for image_id, attributes in pairs}
        self.engine = make_engine(self.config, vocabulary)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._run(self.engine.start())

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def __call__(self, work: list[Any]) -> stages.Output:
        encoded = self.store.take(self.images, [(part, row) for part, row, _ in work], ["image"])["image"]
        subjects = [
            Subject(image_id=image_id, image=image.as_py(), attributes=self.truth.get(image_id))
            for (_, _, image_id), image in zip(work, encoded, strict=True)
        ]
        return self._run(self._converse(subjects))

    async def _converse(self, subjects: list[Subject]) -> stages.Output:
        in_flight = asyncio.Semaphore(self.config.conversations)

        async def one(subject: Subject) -> Dialogue | Reject:
            async with in_flight:
                try:
                    return await converse(
                        self.engine,
                        subject,
                        questions=self.config.questions,
                        answer_tokens=self.config.answer_tokens,
                        summary_tokens=self.config.summary_tokens,
                    )
                except DialogueError as error:
                    return Reject(subject.image_id, error.reason, error.detail)

        results = await asyncio.gather(*(one(subject) for subject in subjects))
        rows, rejects = [], []
        for subject, result in zip(subjects, results, strict=True):
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                rows.append((subject.image_id, result))
        dialogues = [result for _, result in rows]
        counts = {
            "prompt_tokens": sum(made.prompt_tokens for made in dialogues),
            "cached_tokens": sum(made.cached_tokens for made in dialogues),
            "completion_tokens": sum(made.completion_tokens for made in dialogues),
            "answers_cut_off": sum(made.cut_off for made in dialogues),
            "summaries_over_77_tokens": sum(count_tokens(made.summary) > CONTEXT for made in dialogues),
        }
        return stages.Output({"dialogues": _table(rows, self.engine.model, self.settings)}, rejects, counts)


def _table(rows: list[tuple[str, Dialogue]], model: str, settings: str) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "image_id": image_id,
                "turns": [{"question": turn.question, "answer": turn.answer} for turn in made.turns],
                "summary": made.summary,
                "model": model,
                "prompt_version": PROMPT_VERSION,
                "generation_settings": settings,
                "prompt_tokens": made.prompt_tokens,
                "cached_tokens": made.cached_tokens,
                "completion_tokens": made.completion_tokens,
            }
            for image_id, made in rows
        ],
        DIALOGUES,
    )


# --- the authors' published dialogues ---------------------------------------------------------------------


def _import_published(store: Store, config: DialogueConfig, images: Manifest, *, redo: bool) -> dict[str, Manifest]:
    assert config.published is not None
    fs, path = filesystem(config.published)
    try:
        content = fs.cat_file(path)
        found, unusable = read_published(content)
    except FileNotFoundError:
        raise UserError(f"no file of published dialogues at {config.published}") from None
    except DialogueFormatError as error:
        raise UserError(f"{config.published}: {error}") from None
    rows = list_images(store, images, config.split)[: config.limit]
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
    plan = stages.Plan(
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
    return stages.run(store, plan, redo=redo, replicas=config.replicas, cpus=1)


class ImportWorker:
    """Turns published dialogues into rows."""

    def __init__(self, source: str):
        self.source = source

    def __call__(self, work: list[Any]) -> stages.Output:
        rows = []
        for image_id, entry in work:
            made = PublishedDialogue(**entry)
            turns = [{"question": question, "answer": answer} for question, answer in made.turns]
            rows.append(
                {
                    "image_id": image_id,
                    "turns": turns,
                    "summary": made.summary,
                    "model": "published",
                    "prompt_version": "published",
                    "generation_settings": json.dumps({"source": self.source}),
                    "prompt_tokens": 0,
                    "cached_tokens": 0,
                    "completion_tokens": 0,
                }
            )
        counts = {"summaries_over_77_tokens": sum(count_tokens(row["summary"]) > CONTEXT for row in rows)}
        return stages.Output({"dialogues": pa.Table.from_pylist(rows, DIALOGUES)}, counts=counts)


def _print_counts(dialogues: Manifest) -> None:
    counts = dialogues.notes["counts"]
    prompt = counts.get("prompt_tokens", 0)
    cached = f", {counts['cached_tokens'] / prompt:.0%} of prompt tokens from cache" if prompt else ""
    stages.console.print(
        f"dialogue: {counts.get('answers_cut_off', 0):.0f} answers cut off, "
        f"{counts.get('summaries_over_77_tokens', 0):.0f} of {dialogues.rows} summaries longer than CLIP's 77 tokens"
        f"{cached}"
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("dialogue", argv, prog="dialogue")
    dialogue(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    stages.entry(main)
