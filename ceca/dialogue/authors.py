"""Import of the dialogues that the authors publish (method: The dialogue)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ceca.data.store import Reject

PATH_KEYS = ("file_path", "img_path", "image_path", "path")
SUMMARY_KEYS = ("summary", "text", "answer")
FIRST_SUMMARY_TURN = 4  # the fifth turn or a later one carries the summary


class DialogueFormatError(ValueError):
    """The file is not a list or object of dialogues."""


@dataclass(frozen=True)
class PublishedDialogue:
    """An image's path, its turns (question, answer), and the summary."""

    path: str
    turns: tuple[tuple[str, str], ...]
    summary: str


def read_published(content: bytes) -> tuple[list[PublishedDialogue], list[Reject]]:
    """Dialogues of a published file, and the entries that cannot be used.

    The file is a JSON list of {<path key>: …, dialogue: [turn, …]}, or an object path → turns.

    Raises:
        DialogueFormatError: neither of them.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DialogueFormatError(
            f"not valid JSON ({error}); expected a list of dialogues or an object by path"
        ) from None
    if isinstance(found, dict):
        entries = [(path, path, turns) for path, turns in found.items()]
    elif isinstance(found, list):
        entries = [_entry(position, item) for position, item in enumerate(found)]
    else:
        raise DialogueFormatError(f"expected a JSON list or object of dialogues, found {type(found).__name__}")
    dialogues: dict[str, PublishedDialogue] = {}
    rejects = []
    for key, path, turns in entries:
        made = _read(key, path, turns)
        if isinstance(made, Reject):
            rejects.append(made)
        elif made.path in dialogues:
            rejects.append(
                Reject(key, "duplicated_dialogue", "the image has a dialogue already; the first one is kept")
            )
        else:
            dialogues[made.path] = made
    if entries and not dialogues and all(made.reason in ("missing_key", "bad_dialogue") for made in rejects):
        raise DialogueFormatError(
            f"none of its {len(entries)} entries is a dialogue (the first: {rejects[0].detail}); expected a JSON list "
            f"of {{{' | '.join(PATH_KEYS)}: …, dialogue: [turn, …]}} or an object path → turns"
        )
    return list(dialogues.values()), rejects


def _entry(position: int, item: Any) -> tuple[str, Any, Any]:
    if not isinstance(item, dict):
        return f"entry {position}", None, None
    path = next((item[key] for key in PATH_KEYS if key in item), None)
    return (path if isinstance(path, str) else f"entry {position}"), path, item.get("dialogue")


def _read(key: str, path: Any, turns: Any) -> PublishedDialogue | Reject:
    if isinstance(turns, dict):
        turns = turns.get("dialogue")
    if not isinstance(path, str) or not path:
        return Reject(key, "missing_key", f"no path of an image under any of {', '.join(PATH_KEYS)}")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Reject(key, "bad_dialogue", f"expected a list of turns, found {turns!r:.100}")
    for names in (SUMMARY_KEYS[:1], SUMMARY_KEYS):  # a turn that is named the summary goes before any later one
        for position in range(len(turns) - 1, FIRST_SUMMARY_TURN - 1, -1):
            text = next((text for name in names if (text := _text(turns[position], name))), "")
            if text:
                spoken = tuple((_text(turn, "question"), _text(turn, "answer")) for turn in turns[:position])
                return PublishedDialogue(path, tuple(turn for turn in spoken if turn[1]), text)
    return Reject(
        key, "no_summary", f"none of its {len(turns)} turns from the fifth on carries {', '.join(SUMMARY_KEYS)}"
    )


def _text(turn: dict[str, Any], name: str) -> str:
    """A turn's text under a key, on one line; empty where there is none."""
    value = turn.get(name)
    return " ".join(value.split()) if isinstance(value, str) else ""
