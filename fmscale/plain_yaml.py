"""YAML as its version 1.2 has it, in which nothing is anything but what it looks like."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fmscale.errors import UserError


class Loader(yaml.SafeLoader):
    """Safe YAML in which duplicate keys are errors, 1e-4 is a number, and only true and false are booleans."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# The resolvers of YAML 1.2's core schema in place of YAML 1.1's, where `no` is false, 1:30 is 90 and 1e-4 is text.
Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+",
        "-+.0123456789",
    ),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, where: str) -> Any:
    """The value that a piece of YAML stands for.

    Args:
        text: YAML, without anchors of arbitrary types: only plain data is ever built.
        where: what to call it in an error, a file's path for instance.

    Raises:
        UserError: not valid YAML, or a key stands twice.
    """
    try:
        return Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else where
        raise UserError(f"{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
