"""Reads YAML so that every value knows its line, and nothing is lost in silence.

PyYAML alone reads `2e-4` as a string, keeps the last of two equal keys, and forgets where a value stood.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils.exceptions import Problem, RecipeError

KeyPath = tuple[str, ...]
MAX_BYTES = 1_000_000
# YAML 1.2 floats: PyYAML follows 1.1, where the dot and the exponent's sign are required.
FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)?\.?[0-9]+(?:[eE][-+]?[0-9]+)$")


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader that also reads `2e-4` as a number and `on`/`off`/`yes`/`no` as the words they are."""


# Resolvers are tried in order for the first character of a value: copy the table so that PyYAML's own stays untouched.
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass
class YamlDocument:
    """Values of a YAML file with the line that each key stands on.

    Attributes:
        values: the plain nested dictionary.
        lines: line (from 1) of each key path; the empty path is the document itself.
    """

    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)


def read_yaml(path: Path) -> YamlDocument:
    """Reads a recipe file.

    Raises:
        RecipeError: the file is missing, not YAML, not a mapping, repeats a key or uses aliases.
    """
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Reads a small UTF-8 text file, with a recipe error for each way that this fails."""
    if not path.exists():
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        fix = f"recipes here: {', '.join(near)}" if near else "check the path"
        raise RecipeError("no such recipe file", where=str(path), fix=fix, code="no-recipe")
    if not path.is_file():
        raise RecipeError("this is not a file", where=str(path), fix="name a YAML file", code="no-recipe")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path), code="no-recipe") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"is larger than {MAX_BYTES:,} bytes, so it is no recipe", where=str(path), code="yaml")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError("is not UTF-8 text", where=f"{path}:{line}", fix="save it as UTF-8", code="yaml") from error


def parse_yaml(text: str, name: str) -> YamlDocument:
    """Parses YAML text; `name` is what errors call it."""
    try:
        node = yaml.compose(text, Loader=RecipeLoader)
        if node is None:
            raise RecipeError("the recipe is empty", where=f"{name}:1", fix="copy one from recipes/", code="yaml")
        lines: dict[KeyPath, int] = {(): 1}
        problems = list(find_node_problems(node, (), lines, name))
        if problems:
            raise RecipeError.from_problems(problems)
        values = RecipeLoader(text).construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        message = f"is not valid YAML: {error.problem or error.context}"
        raise RecipeError(
            message, where=f"{name}:{line}", fix="check indentation, colons and quotes", code="yaml"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"is not valid YAML: {error}", where=name, code="yaml") from error
    if not isinstance(values, dict):
        raise RecipeError(
            "a recipe is a mapping of sections", where=f"{name}:1", fix="start with `model:`", code="yaml"
        )
    return YamlDocument(values, lines)


def find_node_problems(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> list[Problem]:
    """Walks the node tree, filling `lines` and collecting repeated keys and merge keys."""
    if not isinstance(node, yaml.MappingNode):
        return []
    problems: list[Problem] = []
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            problems.append(Problem("yaml", "a key must be a plain word", where, "quote it, or remove it"))
            continue
        here = (*path, key_node.value)
        if here in lines:
            message = f"{'.'.join(here)} is given twice, first on line {lines[here]}"
            problems.append(Problem("duplicate-key", message, where, "keep one of them"))
            continue
        lines[here] = key_node.start_mark.line + 1
        problems += find_node_problems(value_node, here, lines, name)
    return problems
