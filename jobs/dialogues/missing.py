"""`--only-missing`: the images that a published table of dialogues lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ceca.data.store import Manifest, Store
from ceca.data.tables import Images, read_keys
from ceca.dialogue.conversation import PROMPT_VERSION
from ceca.errors import UserError

# Choose images, not questions; `agree` says what is done with the answers.
IMAGE_SETTINGS = ("split", "limit", "only_missing", "images_per_part", "published", "agree")
ENGINES = ("vllm", "openai", "oracle")


def deciding_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the answers: the settings of unused engines are left out."""
    chosen = {key: value for key, value in settings.items() if key not in ENGINES}
    return {**chosen, settings["engine"]: settings[settings["engine"]]}


def missing_images(store: Store, earlier: Manifest, images: Images, settings: Mapping[str, Any]) -> Images:
    """Find the images that a published table lacks.

    Args:
        store: the dataset.
        earlier: the published table of dialogues.
        images: images to look for.
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
    agreed = published.get("agree", "none")
    if agreed != "none" and "agree" not in settings:
        differing.append(f"agree: {agreed} there, none here")
    if earlier.notes.get("prompt_version") != PROMPT_VERSION:
        differing.append(f"prompts: {earlier.notes.get('prompt_version')} there, {PROMPT_VERSION} here")
    if differing:
        raise UserError(
            f"{store.place('dialogues')} was made in another way ({'; '.join(differing)}), and one table holds answers "
            "of one kind: leave --only-missing out to ask about every image, or give the same settings"
        )
    return images.take(~np.isin(images.keys, read_keys(store, earlier))) if earlier.rows else images
