"""A part of a config as a record: how data becomes one, what is said where it does not, and how it is written down."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fmscale.errors import UserError


class Section(BaseModel):
    """A part of a config: no coercion, no unknown keys, no change after it is made."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


ConfigType = TypeVar("ConfigType", bound=Section)


def check(kind: type[ConfigType], data: dict[str, Any], where: str, given: dict[str, Any] | None = None) -> ConfigType:
    """`data` as a record of `kind`; `given` is the part of it that came from the command line."""
    try:
        plain = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: holds something that is no plain value ({error})") from None
    try:
        return kind.model_validate_json(plain)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key is often the cause of a missing one: say it first.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        source = "command line" if _contains(given or {}, first["loc"]) else where
        raise UserError(f"{source}: {_explain(kind, first)}{more}") from None


def _contains(data: Any, loc: tuple[int | str, ...]) -> bool:
    for part in loc:
        if not isinstance(data, dict):
            return True
        if part not in data:
            return False
        data = data[part]
    return True


def _explain(kind: type[Section], problem: Any) -> str:
    """One problem as `key: what is wrong, what was given, what is allowed`."""
    loc = problem["loc"]
    name = ".".join(str(part) for part in loc) or "config"
    if problem["type"] == "extra_forbidden":
        allowed = _keys_at(kind, loc[:-1])
        everywhere = [path for path, _ in flatten_schema(kind)]
        near = difflib.get_close_matches(str(loc[-1]), allowed, 1, 0.6)
        prefix = "".join(f"{part}." for part in loc[:-1])
        guess = [prefix + near[0]] if near else [path for path in everywhere if path.split(".")[-1] == loc[-1]]
        hint = f"did you mean {guess[0]}? " if guess else ""
        return f"{name}: no such key; {hint}allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{name}: must be given"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}; given {json.dumps(problem['input'], default=str)}"


def _section_of(annotation: Any) -> type[Section] | None:
    """The record inside an annotation such as `TextSource | None`."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _keys_at(kind: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = kind.model_fields.get(str(part))
        kind = (_section_of(field.annotation) if field else None) or kind
    return list(kind.model_fields)


def flatten_schema(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config as (dotted path, field), parts before what they hold."""
    for name, field in kind.model_fields.items():
        yield prefix + name, field
        if section := _section_of(field.annotation):
            yield from flatten_schema(section, f"{prefix}{name}.")


def flatten(config: Section) -> dict[str, Any]:
    """Every value of a config by dotted path, as plain data."""

    def walk(data: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in data.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def dump(config: Section) -> str:
    """The whole config as YAML, such that reading it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
