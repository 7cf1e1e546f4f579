"""`ceca --help` and every command's help: they name all options and start without Ray, torch and the models."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

from ceca.config import STAGES
from jobs.cli import COMMANDS, PROGRAMS
from jobs.compare import compare
from jobs.export import export_trec, export_webdataset
from jobs.gc import gc
from jobs.open import open_pictures
from jobs.push import push
from jobs.remove import remove
from jobs.report import KINDS
from jobs.search import search
from jobs.weights import export_weights, import_weights
from tests.conftest import REPOSITORY

HEAVY = ("ray", "torch", "open_clip", "transformers", "deepspeed", "vllm", "matplotlib")

# One process for all: prints {command: {"text": …, "heavy": […]}} for the commands in its arguments.
SHOW = """
import contextlib, io, json, sys
from jobs.cli import main
heavy, shown = sys.argv[1].split(","), {}
for command in sys.argv[2:]:
    text = io.StringIO()
    sys.argv = ["ceca", *command.split(), "--help"]
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main()
    shown[command] = {"text": text.getvalue(), "heavy": [name for name in heavy if name in sys.modules]}
print(json.dumps(shown))
"""


def parameters(function: Any) -> list[str]:
    """The options of a command that is a function, without arguments that have no name."""
    nameless = {(search, "query"), (open_pictures, "source"), (push, "model"), (push, "name")}
    return [name for name in inspect.signature(function).parameters if (function, name) not in nameless]


def settings(config: type, prefix: str = "") -> list[str]:
    """The options of a stage, with those of its sections (--model.backbone)."""
    options = []
    for field in dataclasses.fields(config):
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            options += settings(type(default), f"{prefix}{field.name}.")
        else:
            options.append(f"{prefix}{field.name}")
    return options


OPTIONS: dict[str, list[str]] = {
    **{stage: ["data", "recipe", "redo", *settings(STAGES[stage])] for stage in STAGES if stage in COMMANDS},
    "demo": ["folder", "recipe"],
    "open": parameters(open_pictures),
    "pipeline": ["data", "source", "recipe", "name"],
    "compare": parameters(compare),
    "remove": parameters(remove),
    "gc": parameters(gc),
    "search": parameters(search),
    "push": parameters(push),
    "weights import": parameters(import_weights),
    "weights export": parameters(export_weights),
    "export trec": parameters(export_trec),
    "export webdataset": parameters(export_webdataset),
    **{f"report {kind}": parameters(function) for kind, function in KINDS.items()},
}
OPTIONS["train"].append("dry_run")
for program in PROGRAMS:
    OPTIONS.pop(program, None)


@pytest.fixture(scope="module")
def shown() -> dict[str, dict[str, Any]]:
    commands = ["", "weights", "export", "report", *OPTIONS]
    finished = subprocess.run(
        [sys.executable, "-c", SHOW, ",".join(HEAVY), *commands],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return json.loads(finished.stdout)


def test_no_help_imports_ray_torch_or_a_model_library(shown):
    assert {command: help["heavy"] for command, help in shown.items()} == {command: [] for command in shown}


def test_the_first_page_names_every_command(shown):
    assert [line.split()[0] for line in shown[""]["text"].splitlines()[2:]] == list(COMMANDS)
    assert {command.split()[0] for command in OPTIONS} | set(PROGRAMS) == set(COMMANDS)


@pytest.mark.parametrize("command", OPTIONS)
def test_a_commands_help_names_every_option(shown, command):
    words = shown[command]["text"].replace("│", " ").split()
    for option in OPTIONS[command]:
        name = f"--{option.replace('_', '-')}"
        assert any(word.strip("[],|") == name for word in words), (command, name)


@pytest.mark.parametrize("command", ["weights", "report"])
def test_a_command_with_kinds_names_them(shown, command):
    kinds = [other.split()[1] for other in OPTIONS if other.startswith(f"{command} ")]
    assert all(kind in shown[command]["text"] for kind in kinds)
