"""`--only-missing`: the images that a published table of dialogues lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceca.data.store import Manifest, Store
from ceca.data.tables import ImageRow
from ceca.dialogue.conversation import PROMPT_VERSION
from ceca.errors import UserError

IMAGE_SETTINGS = ("split", "limit", "only_missing", "images_per_part", "published")  # choose images, not questions
ENGINES = ("vllm", "openai", "oracle")


def deciding_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the answers: the settings of unused engines are left out."""
    chosen = {key: value for key, value in settings.items() if key not in ENGINES}
    return {**chosen, settings["engine"]: settings[settings["engine"]]}


def missing_images(
    store: Store, earlier: Manifest, rows: list[ImageRow], settings: Mapping[str, Any]
) -> list[ImageRow]:
    """List the images that a published table lacks.

    Args:
        store: the dataset.
        earlier: the published table of dialogues.
        rows: images to look for.
        settings: the settings of this run.

    Raises:
        UserError: the table was made with other settings or prompts.
    """
    published = deciding_settings(earlier.config) if "engine" in earlier.config else {}
    differing = [
        f"{key}: {published.get(key)} there, {value} here"
        for key, value in deciding_settings(settings).items()
        if key not in IMAGE_SETTINGS and published.get(key) != value
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
