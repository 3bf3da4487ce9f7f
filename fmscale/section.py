"""A part of a config as a record: how data becomes one, what is said where it does not, and how it is written down."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError

from fmscale.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[str, Field(min_length=1)]


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
        source = "command line" if _contains(given or {}, _resolve(kind, first["loc"])[0]) else where
        raise UserError(f"{source}: {_explain(kind, first)}{more}") from None


def _contains(data: Any, keys: Sequence[str]) -> bool:
    for part in keys:
        if not isinstance(data, dict):
            return True
        if part not in data:
            return False
        data = data[part]
    return True


def _explain(kind: type[Section], problem: Any) -> str:
    """One problem as `key: what is wrong, what was given, what is allowed`."""
    keys, holder = _resolve(kind, problem["loc"])
    name = ".".join(keys) or "config"
    if problem["type"] == "extra_forbidden":
        allowed = list(holder.model_fields)
        everywhere = [path for path, _ in flatten_schema(kind)]
        near = difflib.get_close_matches(keys[-1], allowed, 1, 0.6)
        prefix = "".join(f"{key}." for key in keys[:-1])
        guess = [prefix + near[0]] if near else [path for path in everywhere if path.split(".")[-1] == keys[-1]]
        hint = f"did you mean {guess[0]}? " if guess else ""
        if name in everywhere:
            hint = f"another kind of {'.'.join(keys[:-1])} has it; "
        if "." in keys[-1]:
            nested = keys[-1].replace(".", ": {") + ": …" + "}" * keys[-1].count(".")
            hint = f"parts of a key stand within one another, as {nested}; "
        return f"{name}: no such key; {hint}allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{name}: must be given"
    message = problem["msg"].removeprefix("Value error, ")
    given = f"; given {json.dumps(problem['input'], default=str)}" if keys else ""  # not the whole config
    return f"{name}: {message[0].lower()}{message[1:]}{given}"


def _sections_of(annotation: Any) -> dict[str, type[Section]]:
    """The records inside an annotation such as `TextSource | None`, by the tag that tells those of a union apart."""
    found: dict[str, type[Section]] = {}
    for part in (annotation, *get_args(annotation)):
        tag = next((note.tag for note in getattr(part, "__metadata__", ()) if isinstance(note, Tag)), "")
        kind = get_args(part)[0] if tag else part
        if isinstance(kind, type) and issubclass(kind, Section):
            found[tag] = kind
    return found


def _resolve(kind: type[Section], loc: Sequence[int | str]) -> tuple[list[str], type[Section]]:
    """The keys that lead to a place in a config, without the tags of unions, and the record that holds the last one."""
    keys: list[str] = []
    holder, inside = kind, {"": kind}
    for part in map(str, loc):
        if part and part in inside:
            inside = {"": inside[part]}  # the tag says which
            continue
        keys.append(part)
        holder = next(iter(inside.values()), holder)
        field = holder.model_fields.get(part)
        inside = _sections_of(field.annotation) if field else {}
    return keys, holder


def flatten_schema(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config as (dotted path, field), parts before what they hold; of a union, those of each."""
    for name, field in kind.model_fields.items():
        yield prefix + name, field
        for section in _sections_of(field.annotation).values():
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
