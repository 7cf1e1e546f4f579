"""The machinery of settings: frozen dataclasses, checked when they are made, and read from plain values."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ceca.errors import UserError

T = TypeVar("T")


Positive = Annotated[int, Field(ge=1)]


NonNegative = Annotated[int, Field(ge=0)]


PositiveFloat = Annotated[float, Field(gt=0)]


Share = Annotated[float, Field(ge=0, le=1)]


Execution = "execution"  # metadata key: the field says how a job runs, not what it computes
Added = "added"  # metadata key: the field came after tables were published


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message says which key, what was found and what is valid."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass whose values are checked against their types when it is made.

    A value that does not fit raises ConfigError.
    """
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    make = made.__init__

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            make(self, *args, **values)
        except ValidationError as error:
            raise ConfigError(_problems(error)) from None

    made.__init__ = __init__
    return made


def added(default: Any) -> Any:
    """A field that came after tables were published: at its default it is left out of a result's version.

    So what was published before it existed keeps its version.
    """
    return dataclasses.field(default=default, metadata={Added: True})


def execution(default: Any) -> Any:
    """A field that says how a job runs (workers, replicas), so that it is left out of a result's version."""
    return dataclasses.field(default=default, metadata={Execution: True})


def from_mapping(config_type: type[T], mapping: dict[str, Any], where: str = "configuration") -> T:
    """Make a config from plain values, e.g. a recipe's section.

    Raises:
        ConfigError: a key is unknown (the valid ones are listed) or a value does not fit its type.
    """
    _refuse_unknown_keys(config_type, mapping, where)
    try:
        return TypeAdapter(config_type).validate_python(mapping)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    """What is wrong, each with the setting's name; a rule over several settings says by itself what it found."""
    found = []
    for problem in error.errors():
        if problem["type"] == "value_error":
            found.append(problem["msg"].removeprefix("Value error, "))
        else:
            name = ".".join(map(str, problem["loc"])) or "value"
            found.append(f"{name}: {problem['msg']} (found {problem['input']!r})")
    return "; ".join(found)


def _refuse_unknown_keys(config_type: type, mapping: Any, where: str) -> None:
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
    """The resolved configuration as plain values, for a manifest.

    With `results_only`, fields that only say how a job runs (workers, replicas) are left out, so that the same
    work on another cluster has the same version.
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
