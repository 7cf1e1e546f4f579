"""Reader of the dialogues that the authors publish (method: The dialogue)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ceca.data.store import Reject
from ceca.dialogue.answers import one_line
from ceca.dialogue.conversation import Turn

PATH_KEYS = ("file_path", "img_path", "image_path", "path")
SUMMARY_KEYS = ("summary", "text", "answer")
FIRST_SUMMARY_TURN = 4  # the summary is in the fifth turn or a later one


class DialogueFormatError(ValueError):
    """The file is not a list or object of dialogues, or its paths could mean several images."""


@dataclass(frozen=True)
class PublishedDialogue:
    """A published dialogue: path of the image, turns, and summary."""

    path: str
    turns: tuple[Turn, ...]
    summary: str


class _Entry(NamedTuple):
    """An entry of the file, before any check. `key` names it in the table of rejects."""

    key: str
    path: Any
    turns: Any


def read_published(content: bytes) -> tuple[list[PublishedDialogue], list[Reject]]:
    """Read a published file: a JSON list of {<path key>: …, dialogue: [turn, …]}, or an object path → turns.

    Instead of its turns, an entry may have the summary alone: {<path key>: …, summary: …}, or path → {summary: …}.

    Args:
        content: bytes of the file.

    Returns:
        The dialogues, and a reject for each unusable entry.

    Raises:
        DialogueFormatError: the file has another format.
    """
    entries = _parse(content)
    dialogues: dict[str, PublishedDialogue] = {}
    rejects = []
    for entry in entries:
        dialogue = _read(entry)
        if isinstance(dialogue, Reject):
            rejects.append(dialogue)
        elif dialogue.path in dialogues:
            detail = "the image has a dialogue already; the first one is kept"
            rejects.append(Reject(entry.key, "duplicated_dialogue", detail))
        else:
            dialogues[dialogue.path] = dialogue
    if entries and not dialogues and all(reject.reason in ("missing_key", "bad_dialogue") for reject in rejects):
        raise DialogueFormatError(
            f"none of its {len(entries)} entries is a dialogue (the first: {rejects[0].detail}); expected a JSON list "
            f"of {{{' | '.join(PATH_KEYS)}: …, dialogue: [turn, …]}}, an object path → turns, or path → {{summary: …}}"
        )
    return list(dialogues.values()), rejects


def match_paths(named: Iterable[str], images: Iterable[str]) -> dict[str, str]:
    """Find the image that each path of a file means.

    An equal path is the image's. Any other means the image of the same file name; if there are several, the one with
    which it shares most folders, counted from the file name upwards.

    Args:
        named: paths of a file.
        images: paths of the dataset's images.

    Returns:
        Path of the file → path of the image. A path that means no image is left out.

    Raises:
        DialogueFormatError: a path means several images equally well, or several paths mean one image.
    """
    named, free = list(named), dict.fromkeys(images)
    matched = {path: path for path in named if path in free}
    by_name = defaultdict(list)
    for image in free:
        if image not in matched:
            by_name[_folders(image)[0]].append(image)
    claims: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)  # image → (names in common, path)
    unclear = {}
    for path in named:
        if path in matched:
            continue
        shared = {image: _in_common(path, image) for image in by_name.get(_folders(path)[0], ())}
        meant = [image for image, names in shared.items() if names == max(shared.values())]
        if len(meant) == 1:
            claims[meant[0]].append((shared[meant[0]], path))
        elif meant:
            unclear[path] = meant
    for image, claimants in claims.items():
        best = [path for names, path in claimants if names == max(claimants)[0]]
        if len(best) == 1:
            matched[best[0]] = image
        else:
            unclear[image] = best
    if unclear:
        lines = [f"  {one}: {', '.join(several[:5])}{', …' * (len(several) > 5)}" for one, several in unclear.items()]
        more = [f"  … and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise DialogueFormatError(
            f"{len(lines)} file names fit several paths. Give these paths as the dataset has them:\n"
            + "\n".join(lines[:20] + more)
        )
    return matched


def _folders(path: str) -> list[str]:
    """Return the names of a path, the file's first."""
    return path.replace("\\", "/").split("/")[::-1]


def _in_common(one: str, other: str) -> int:
    """Count the names that two paths share, from the file's upwards."""
    names = 0
    for left, right in zip(_folders(one), _folders(other), strict=False):
        if left != right:
            break
        names += 1
    return names


def _parse(content: bytes) -> list[_Entry]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DialogueFormatError(
            f"not valid JSON ({error}); expected a list of dialogues or an object by path"
        ) from None
    if isinstance(value, dict):
        return [_Entry(path, path, turns) for path, turns in value.items()]
    if isinstance(value, list):
        return [_entry(position, item) for position, item in enumerate(value)]
    raise DialogueFormatError(f"expected a JSON list or object of dialogues, found {type(value).__name__}")


def _entry(position: int, item: Any) -> _Entry:
    """Return the entry at a position of the list."""
    key = f"entry {position}"
    if not isinstance(item, dict):
        return _Entry(key, None, None)
    path = next((item[name] for name in PATH_KEYS if name in item), None)
    return _Entry(path if isinstance(path, str) else key, path, item.get("dialogue", item))


def _read(entry: _Entry) -> PublishedDialogue | Reject:
    """Check an entry and read its turns and summary."""
    path, turns = entry.path, entry.turns
    if not isinstance(path, str) or not path:
        return Reject(entry.key, "missing_key", f"no image path under any of {', '.join(PATH_KEYS)}")
    if isinstance(turns, dict):
        if "dialogue" not in turns and (summary := _text(turns, "summary")):
            return PublishedDialogue(path, (), summary)
        turns = turns.get("dialogue")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Reject(entry.key, "bad_dialogue", f"expected a list of turns, found {turns!r:.100}")
    for names in (SUMMARY_KEYS[:1], SUMMARY_KEYS):  # a turn with the key "summary" is preferred to later turns
        for position in range(len(turns) - 1, FIRST_SUMMARY_TURN - 1, -1):
            summary = next((text for name in names if (text := _text(turns[position], name))), "")
            if summary:
                spoken = (Turn(_text(turn, "question"), _text(turn, "answer")) for turn in turns[:position])
                return PublishedDialogue(path, tuple(turn for turn in spoken if turn.answer), summary)
    detail = f"none of its {len(turns)} turns from the fifth on has any of {', '.join(SUMMARY_KEYS)}"
    return Reject(entry.key, "no_summary", detail)


def _text(turn: dict[str, Any], name: str) -> str:
    """Return the text under a key of a turn, on one line; "" if there is no text."""
    value = turn.get(name)
    return one_line(value) if isinstance(value, str) else ""
