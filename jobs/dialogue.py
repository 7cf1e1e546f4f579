"""Dialogue: every image is asked about and summarised (Conversation Attribute Mining); the answers become a table.

    python jobs/dialogue.py --data s3://bucket/cuhk --engine vllm --vllm.model Qwen/Qwen2-VL-7B-Instruct

Each worker holds one engine and keeps many conversations in flight. `--only-missing` asks about images that the
published table lacks. `--published FILE` imports dialogues that the authors publish instead of asking.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceca.commandline import parse_arguments
from ceca.config import DialogueConfig
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import Manifest, Receipt, Store, version_of
from ceca.data.tables import ImageRow, list_images
from ceca.dialogue.attributes import read_vocabulary
from ceca.dialogue.conversation import PROMPT_VERSION
from ceca.errors import UserError
from ceca.settings import to_mapping
from jobs.dialogues.authors import import_published
from jobs.dialogues.worker import DialogueWorker
from jobs.runtime.console import console, entry
from jobs.runtime.units import Plan, run_plan

CANARIES = 4  # images whose answers are compared before the work
UNITS_AT_ONCE = 2  # on one worker: while one drains, the next fills the engine
WHICH = ("split", "limit", "only_missing", "images_per_part", "published")  # which images, not what is asked


def dialogue(data: str, config: DialogueConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish the table dialogues for the images of a dataset."""
    store = Store(data)
    images = store.current("images", "ingest")
    rows = list_images(store, images, config.split)[: config.limit]
    if config.published is not None:
        return import_published(store, config, images, rows, redo=redo)
    made_from = {"images": images.version}
    attributes = store.manifest("attributes")
    vocabulary = read_vocabulary(store)
    if config.engine == "oracle":
        if attributes is None:
            raise UserError(
                f"the oracle reads its answers from the attributes of drawn pedestrians, and {store.uri} has no table "
                "of attributes; choose --engine vllm or --engine openai"
            )
        made_from["attributes"] = attributes.version
        console.print(
            f"dialogue: the oracle is a simulated annotator that knows the truth and errs in "
            f"{config.oracle.error_rate:.0%} of attributes; its summaries say nothing about a multimodal model"
        )
    choices = vocabulary if config.attributes else None
    settings = to_mapping(config, results_only=True)
    kept: list[Receipt] = []
    if config.only_missing:
        earlier = store.current("dialogues")
        rows = _missing(store, earlier, rows, settings)
        if not rows and earlier.made_from.get("images") == images.version:
            console.print(f"dialogue: no image lacks one in {store.place('dialogues')}")
            return {"dialogues": earlier}
        made_from["dialogues"] = earlier.version
        kept = [Receipt({"dialogues": part}) for part in earlier.parts]
    units = [
        [[row.part, row.row, row.image_id] for row in rows[start : start + config.images_per_part]]
        for start in range(0, len(rows), config.images_per_part)
    ]
    canaries = rows[:: max(1, len(rows) // CANARIES)][:CANARIES] if config.canary and config.engine != "oracle" else []
    plan = Plan(
        stage="dialogue",
        version=version_of("dialogue", SCHEMA_VERSION, PROMPT_VERSION, made_from, _deciding(settings), choices),
        tables=("dialogues",),
        units=units,
        sizes=[len(unit) for unit in units],
        worker=DialogueWorker,
        arguments={
            "uri": store.uri,
            "images": images,
            "config": to_mapping(config),
            "vocabulary": vocabulary,
            "choices": choices,
            "canaries": [[row.part, row.row, row.image_id] for row in canaries],
        },
        made_from=made_from,
        config=settings,
        kept=kept,
        notes={"prompt_version": PROMPT_VERSION},
        progress=_progress,
    )
    gpus = config.vllm.gpus * config.vllm.tensor_parallel if config.engine == "vllm" else 0
    manifests = run_plan(
        store, plan, redo=redo, replicas=config.replicas, cpus=1, gpus=gpus, units_at_once=UNITS_AT_ONCE
    )
    _print_report(manifests["dialogues"], gpus)
    return manifests


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the answers: another engine's settings change nothing."""
    chosen = {key: value for key, value in settings.items() if key not in ("vllm", "openai", "oracle")}
    return {**chosen, settings["engine"]: settings[settings["engine"]]}


def _missing(store: Store, earlier: Manifest, rows: list[ImageRow], settings: dict[str, Any]) -> list[ImageRow]:
    """The images that a published table lacks; a table that was made in another way is refused."""
    there = _deciding(earlier.config) if "engine" in earlier.config else {}
    differing = [
        f"{key}: {there.get(key)} there, {value} here"
        for key, value in _deciding(settings).items()
        if key not in WHICH and there.get(key) != value
    ]
    if earlier.notes.get("prompt_version") != PROMPT_VERSION:
        differing.append(f"prompts: {earlier.notes.get('prompt_version')} there, {PROMPT_VERSION} here")
    if differing:
        raise UserError(
            f"{store.place('dialogues')} was made in another way ({'; '.join(differing)}), and one table holds answers "
            "of one kind: leave --only-missing out to ask about every image, or give the same settings"
        )
    present = set(store.read(earlier, ["image_id"])["image_id"].to_pylist()) if earlier.rows else set()
    return [row for row in rows if row.image_id not in present]


def _progress(counts: Mapping[str, float], seconds: float) -> str:
    prompt = counts.get("prompt_tokens", 0)
    if not prompt:
        return ""
    tokens = (prompt + counts["completion_tokens"]) / max(seconds, 1e-9)
    return f"{tokens:,.0f} tokens/s, {counts['cached_tokens'] / prompt:.0%} of prompts from cache"


def _print_report(dialogues: Manifest, gpus: int) -> None:
    """What a person wants to know of a table of dialogues before using it."""
    counts = dialogues.notes["counts"]
    asked = counts.get("dialogues", 0)
    if not asked:
        return
    lines = [
        f"summaries: {counts['summary_clip_tokens'] / asked:.0f} tokens of CLIP's on average, "
        f"{counts['summaries_over_77_tokens'] / asked:.1%} longer than its 77"
    ]
    flags = {name.removeprefix("flag_"): count for name, count in counts.items() if name.startswith("flag_")}
    if flags:
        lines.append("flagged: " + ", ".join(f"{count:.0f} {name}" for name, count in sorted(flags.items())))
    if flags.get("repeated", 0) > 0.2 * asked:
        lines.append("[yellow]warning:[/] many images have the same summary; look at the answers before training")
    prompt = counts["prompt_tokens"]
    if prompt:
        whole = counts["engine_busy_s"] + counts["engine_idle_s"]
        reusable = counts["reusable_tokens"]
        of_reusable = f" ({min(1, counts['cached_tokens'] / reusable):.0%} of what could be)" if reusable else ""
        lines.append(
            f"tokens: {prompt:,.0f} of prompts, {counts['cached_tokens'] / prompt:.0%} from cache{of_reusable}, "
            f"{counts['completion_tokens']:,.0f} of answers"
        )
        lines.append(
            f"engines: idle {counts['engine_idle_s'] / max(whole, 1e-9):.1%} of the time, "
            f"{counts['conversation_s'] / max(counts['engine_busy_s'], 1e-9):.0f} conversations in flight on average, "
            f"{1000 * whole * max(gpus, 1) / asked:,.0f} {'GPU ' if gpus else 'worker '}seconds per 1,000 images"
        )
    for line in lines:
        console.print(f"dialogue: {line}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("dialogue", argv, prog="dialogue")
    dialogue(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
