"""Machinery of settings: frozen dataclasses that are validated when they are made, to and from plain values."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ceca.errors import UserError

T = TypeVar("T")


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

Execution = "execution"  # metadata key of fields that decide how a job runs, not what it computes
Added = "added"  # metadata key of fields that came after tables were published


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used. The message names the key, the value found, and what is valid."""


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def check_name(name: str) -> str:
    """Return a name if it is valid: of a model, a cluster or an API key. It becomes a folder, so it has no slash.

    Raises:
        ConfigError: it is not valid.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(
            f"{name!r} cannot be a name: use 1 to 64 letters (a-z), digits, dots, _ and -, and begin with a letter or "
            "a digit"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that validates its values against their types.

    Making an instance with a value that does not fit raises ConfigError.
    """
    validated: Any = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    validate = validated.__init__

    @functools.wraps(validate)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            validate(self, *args, **values)
        except ValidationError as error:
            raise ConfigError(_problems(error)) from None

    validated.__init__ = __init__
    return validated


def added(default: Any) -> Any:
    """Declare a field that came after tables were published.

    At its default it is left out of a result's version, so that earlier results keep theirs.
    """
    return dataclasses.field(default=default, metadata={Added: True})


def execution(default: Any) -> Any:
    """Declare a field that decides how a job runs (workers, replicas); a result's version does not depend on it."""
    return dataclasses.field(default=default, metadata={Execution: True})


def from_mapping(config_type: type[T], mapping: dict[str, Any], where: str = "configuration") -> T:
    """Make a configuration from plain values, e.g. a section of a recipe.

    Args:
        config_type: a class made by `config`.
        mapping: key → value; nested configurations are mappings too.
        where: place of the values, for error messages.

    Raises:
        ConfigError: a key is unknown (the valid ones are listed), or a value does not fit its type.
    """
    _refuse_unknown_keys(config_type, mapping, where)
    try:
        return TypeAdapter(config_type).validate_python(mapping)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    """Describe each problem with the setting's name. The message of a rule over several settings is kept as it is."""
    problems = []
    for problem in error.errors():
        if problem["type"] == "value_error":
            problems.append(problem["msg"].removeprefix("Value error, "))
        else:
            name = ".".join(map(str, problem["loc"])) or "value"
            problems.append(f"{name}: {problem['msg']} (found {problem['input']!r})")
    return "; ".join(problems)


def _refuse_unknown_keys(config_type: type, mapping: Any, where: str) -> None:
    """Raise ConfigError for a key, at any depth, that the configuration does not have."""
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: expected keys and values, found {mapping!r}")
    types = get_type_hints(config_type)
    valid = [field.name for field in dataclasses.fields(config_type)]
    for key, value in mapping.items():
        if key not in valid:
            raise ConfigError(f"{where}: unknown key {key!r}; valid keys: {', '.join(valid)}")
        if dataclasses.is_dataclass(types[key]):
            _refuse_unknown_keys(types[key], value, f"{where}.{key}")  # type: ignore[arg-type]


def to_mapping(settings: Any, *, results_only: bool = False) -> dict[str, Any]:
    """Turn a configuration into plain values, e.g. for a manifest.

    Args:
        settings: an instance of a class made by `config`.
        results_only: leave out fields that decide how a job runs (`execution`), so that the same work on another
            cluster has the same version.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if results_only and field.metadata.get(Execution):
            continue
        if results_only and field.metadata.get(Added) and getattr(settings, field.name) == field.default:
            continue
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = to_mapping(value, results_only=results_only)
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values
