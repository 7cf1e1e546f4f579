"""Reading a stage's configuration from recipes and the command line.

A recipe is a YAML file with one section per stage. Recipes can be combined, e.g. a method's with a benchmark's. The
options of the command line are generated from the types in ceca/config/.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from ceca.config import STAGES
from ceca.settings import ConfigError, from_mapping

RECIPES = Path(__file__).parent / "recipes"

DRY_RUN: Any = (
    "dry_run",
    Annotated[bool, tyro.conf.arg(help="run two small steps on CPU in fp32 from random weights, and keep nothing")],
    dataclasses.field(default=False),
)


def load_recipe(recipe: str) -> dict[str, Any]:
    """Read the sections of one or several recipes: stage → key → value.

    Args:
        recipe: a name below ceca/recipes or the path of a YAML file, or several joined by `+`. A later recipe replaces
            values of an earlier one: `irra+cuhk_pedes` is a method on a benchmark.

    Raises:
        ConfigError: a recipe does not exist or is not a mapping, or a stage, key or value is not valid.
    """
    sections: dict[str, Any] = {}
    for name in recipe.split("+"):
        sections = _merged(sections, _read_recipe(name))
    for stage, section in sections.items():
        from_mapping(STAGES[stage], section, f"recipe {recipe}: {stage}")
    return sections


def list_recipes() -> list[str]:
    """Names of the project's recipes, of benchmarks and of methods."""
    return sorted(path.stem for path in RECIPES.rglob("*.yaml"))


def _read_recipe(name: str) -> dict[str, Any]:
    """Read one recipe; arguments and errors as `load_recipe`."""
    path = Path(name)
    if not name.endswith((".yaml", ".yml")):
        places = [RECIPES / f"{name}.yaml", RECIPES / "methods" / f"{name}.yaml"]
        path = next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        known = ", ".join(list_recipes())
        raise ConfigError(
            f"no recipe {name!r} (looked for {path}); recipes: {known}, several joined by +, or a path ending in .yaml"
        )
    try:
        sections = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(sections, dict):
        raise ConfigError(f"recipe {path}: expected a mapping of stages, found {type(sections).__name__}")
    for stage in sections:
        if stage not in STAGES:
            raise ConfigError(f"recipe {path}: unknown stage {stage!r}; valid stages: {', '.join(STAGES)}")
    return {stage: section or {} for stage, section in sections.items()}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Replace values of `base` by those of `over`, at any depth, in a copy."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of a job's command line."""

    data: str  # URI of the dataset
    redo: bool  # make a new version although this one is published
    config: Any  # the stage's settings
    dry_run: bool = False  # only of `train`


def parse_arguments(stage: str, argv: Sequence[str] | None = None, prog: str | None = None) -> Arguments:
    """Parse a job's command line: `--data URI [--recipe NAME] [--redo]` and one option per setting of the stage.

    The recipe is read first. Its values become the defaults of the options, also in --help.

    Args:
        stage: name of the stage.
        argv: the arguments; by default those of this process.
        prog: name of the program in --help.

    Raises:
        ConfigError: the recipe is not valid, or a rule over several settings does not hold.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    config_type = STAGES[stage]
    recipe = _peek(argv, "--recipe")
    sections = load_recipe(recipe) if recipe else {}
    default: Any = from_mapping(config_type, sections.get(stage) or {}, f"recipe {recipe}: {stage}")
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [
            ("data", Annotated[str, tyro.conf.arg(help="dataset URI: a folder, file://… or s3://bucket/prefix")]),
            (
                "recipe",
                Annotated[str, tyro.conf.arg(help="name or path of a recipe; several joined by +")],
                dataclasses.field(default=recipe or ""),
            ),
            (
                "redo",
                Annotated[bool, tyro.conf.arg(help="make a new version although this one is published")],
                dataclasses.field(default=False),
            ),
            ("config", Annotated[config_type, tyro.conf.arg(name="")], dataclasses.field(default=default)),
            *([DRY_RUN] if stage == "train" else []),
        ],
    )
    parsed: Any = tyro.cli(
        arguments,
        args=argv,
        prog=prog,
        description=config_type.__doc__,
    )
    return Arguments(parsed.data, parsed.redo, parsed.config, getattr(parsed, "dry_run", False))


def _peek(argv: Sequence[str], option: str) -> str | None:
    """Value of an option before the line is parsed; the last value if it is given twice, as in tyro."""
    value = None
    for position, argument in enumerate(argv):
        if argument == option and position + 1 < len(argv):
            value = argv[position + 1]
        elif argument.startswith(f"{option}="):
            value = argument.split("=", 1)[1]
    return value
