"""Figures of the dialogue stage for a person: while it runs, and of the finished table."""

from __future__ import annotations

from collections.abc import Mapping

from ceca.data.store import Manifest
from jobs.runtime.console import console


def progress_words(counts: Mapping[str, float], seconds: float) -> str:
    """Tokens per second and the share of prompts that came from the prefix cache."""
    prompt = counts.get("prompt_tokens", 0)
    if not prompt:
        return ""
    tokens = (prompt + counts["completion_tokens"]) / max(seconds, 1e-9)
    return f"{tokens:,.0f} tokens/s, {counts['cached_tokens'] / prompt:.0%} of prompts from cache"


def print_report(table: Manifest, gpus: float) -> None:
    """Print the lengths of summaries, the flags, and the cost of the answers."""
    counts = table.notes["counts"]
    dialogues = counts.get("dialogues", 0)
    if not dialogues:
        return
    lines = [
        f"summaries: {counts['summary_clip_tokens'] / dialogues:.0f} tokens of CLIP's on average, "
        f"{counts['summaries_over_77_tokens'] / dialogues:.1%} longer than its 77"
    ]
    flags = {name.removeprefix("flag_"): count for name, count in counts.items() if name.startswith("flag_")}
    if flags:
        lines.append("flagged: " + ", ".join(f"{count:.0f} {name}" for name, count in sorted(flags.items())))
    if flags.get("repeated", 0) > 0.2 * dialogues:
        lines.append("warning: many images have the same summary; look at the answers before training")
    prompt = counts["prompt_tokens"]
    if prompt:
        seconds = counts["engine_busy_s"] + counts["engine_idle_s"]
        reusable = counts["reusable_tokens"]
        of_reusable = f" ({min(1, counts['cached_tokens'] / reusable):.0%} of what could be)" if reusable else ""
        lines.append(
            f"tokens: {prompt:,.0f} of prompts, {counts['cached_tokens'] / prompt:.0%} from cache{of_reusable}, "
            f"{counts['completion_tokens']:,.0f} of answers"
        )
        lines.append(
            f"engines: idle {counts['engine_idle_s'] / max(seconds, 1e-9):.1%} of the time, "
            f"{counts['conversation_s'] / max(counts['engine_busy_s'], 1e-9):.0f} conversations in flight on average, "
            f"{1000 * seconds * max(gpus, 1) / dialogues:,.0f} {'GPU ' if gpus else 'worker '}seconds per 1,000 images"
        )
    for line in lines:
        console.print(f"dialogue: {line}")
