"""Model cards: what a published model was made from, how, and what it can do, filled from its records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ceca.model.registry import PublishedModel

FIGURES = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mean_average_precision": "mAP"}


def model_card(name: str, model: PublishedModel, evaluations: Sequence[Mapping[str, Any]], curve: str = "") -> str:
    """The text of a model card, Markdown with the hub's header.

    Args:
        name: of the model, for its title and examples.
        model: the model.
        evaluations: contents of its evaluations' JSON files.
        curve: file name of a picture of its training; empty without one.
    """
    train, record = model.config.get("train") or {}, model.training
    parts = [_HEADER, f"# {name}\n", _what(model)]
    parts += ["## Use\n", _USE.format(name=name)]
    parts += ["## Data\n", _data(model)]
    parts += ["## Training\n", _training(train, record)]
    if curve:
        parts.append(f"![Loss by step and validation by epoch]({curve})\n")
    parts += ["## Figures\n", _figures(model, evaluations), "## Intended use\n", _INTENDED]
    return "\n".join(parts)


_HEADER = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- text-based-person-search
- ceca
---
"""

_USE = """With the Python package `ceca`, both similarities:

```python
import ceca

model = ceca.load("hf://{name}")
images = model.embed_gallery(["a.jpg"], ["A woman in a red coat."])  # image and summary
queries = model.embed_queries(["a woman in a long red coat"])
```

The CLIP part alone, without summaries and the local similarity:

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{name}")
```
"""

_INTENDED = """The model finds images of people by a description of their appearance. It is meant for lost people, own
premises and research, with a legal basis, notice to the people filmed, a written purpose and an end date for the
images. A person must check every hit. It is not meant to identify anybody, to watch groups or places, or to decide
about a person. It finds clothes, not people: it cannot tell two people in the same clothes apart, and it was trained
on English sentences. Errors are not equally many for everyone; measure on images of the place and people concerned.
"""


def _what(model: PublishedModel) -> str:
    settings = model.config["model"]
    local = f"a local branch of width {settings['local_dim']}" if settings["local_branch"] else "no local branch"
    told = f"summaries weigh {settings['summary_weight']:g}" if settings["summary_weight"] else "no summaries"
    size = f"{settings['image_height']}×{settings['image_width']} pixels"
    parts = ", ".join([f"`{settings['backbone']}`", size, f"texts of up to {model.context} tokens", local, told])
    return f"A CLIP dual encoder for text-based person search: {parts}.\n"


def _data(model: PublishedModel) -> str:
    if not model.made_from:
        return f"Imported: {model.training.get('imported_from', 'not recorded')}.\n"
    rows = [f"- {table}: version `{version}`" for table, version in sorted(model.made_from.items())]
    return "\n".join(["Tables of the dataset it was trained on:\n", *rows, ""])


def _training(train: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    if not train:
        return "Not recorded.\n"
    losses = train.get("losses", {})
    rows = [
        ("started from", train.get("model", {}).get("pretrained") or "random weights"),
        ("epochs", train.get("epochs")),
        ("batch", train.get("global_batch")),
        ("precision", train.get("precision")),
        ("losses", ", ".join(losses.get("terms", ()))),
        ("learning rate", train.get("optimiser", {}).get("learning_rate")),
        ("seed", train.get("seed")),
        ("texts cut", ", ".join(f"{share:.1%} of {texts}" for texts, share in record.get("texts_cut", {}).items())),
        ("parameters", record.get("parameters")),
        ("seconds", record.get("seconds")),
        ("epoch chosen", (record.get("best") or {}).get("epoch")),
        ("versions", ", ".join(f"{key} {value}" for key, value in (record.get("versions") or {}).items())),
    ]
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows if value not in (None, ""))]
    recipe = json.dumps(train, indent=1, sort_keys=True, ensure_ascii=False)
    return "\n".join([*table, "", "<details><summary>Recipe</summary>\n", "```json", recipe, "```", "</details>", ""])


def _figures(model: PublishedModel, evaluations: Sequence[Mapping[str, Any]]) -> str:
    chosen = {"validation": "on the validation split", "released": "as by the authors' program (on the test split)"}
    lines = [f"Protocol: `{model.protocol}`; the epoch was chosen {chosen.get(model.protocol, 'on the test split')}.\n"]
    if not evaluations:
        return "\n".join([*lines, "Not evaluated.\n"])
    lines += [f"| split | ω | queries | images | {' | '.join(FIGURES.values())} |", f"|---|{'---:|' * 7}"]
    for found in evaluations:
        metrics = found["metrics"]["fused"]
        figures = " | ".join(f"{metrics[key]:.2f}" for key in FIGURES)
        size = f"{found['queries']:,} | {found['gallery']:,}"
        lines.append(f"| {found['split']} | {found['omega']:g} | {size} | {figures} |")
    return "\n".join([*lines, "", "Text to image, percent; equal similarities rank pessimistically.\n"])
