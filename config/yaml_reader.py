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
NEST = re.compile(r"(?:[\[{]\s*){50}")
# YAML 1.2's core schema. PyYAML follows 1.1, where 2e-4 is text, 010 is 8, 1:30 is 90, on is true and a date is an object.
RESOLVERS = {
    "tag:yaml.org,2002:null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "tag:yaml.org,2002:int": (r"^[-+]?[0-9]+$", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
        list("-+.0123456789"),
    ),
}


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars and without aliases, which could make a small file enormous."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - declared as an attribute of instances there

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuses aliases; everything else is PyYAML's."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed; write the value out", mark)
        return super().compose_node(parent, index)


class RecipeDumper(yaml.SafeDumper):
    """Quotes exactly what RecipeLoader would read as something other than text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - declared as an attribute of instances there


for tag, (pattern, first_characters) in RESOLVERS.items():
    for handler in (RecipeLoader, RecipeDumper):
        handler.add_implicit_resolver(tag, re.compile(pattern), first_characters)
RecipeLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: read_integer(node))
RecipeLoader.add_constructor(
    "tag:yaml.org,2002:float", lambda loader, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
)


def read_integer(node: yaml.Node) -> int:
    """A whole number; Python reads none of more than 4,300 digits."""
    try:
        return int(node.value)
    except ValueError:
        problem = f"a number of {len(node.value):,} digits"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


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
    if found := NEST.search(text):  # PyYAML needs seconds to give up on a hundred thousand brackets
        line = text.count("\n", 0, found.start()) + 1
        raise RecipeError("is nested too deeply", where=f"{name}:{line}", fix="a recipe has two levels", code="yaml")
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
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"is not valid YAML: the character {chr(error.character)!a} is not allowed"
        raise RecipeError(message, where=f"{name}:{line}", fix="remove it", code="yaml") from error
    except RecursionError as error:
        raise RecipeError("is nested too deeply", where=name, fix="a recipe has two levels", code="yaml") from error
    except (yaml.YAMLError, ValueError) as error:
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


def parse_value(text: str) -> Any:
    """Reads the value of one `--set`: YAML where that gives a number, a list or the like, else the text as it stands.

    A `#` or a line break inside a sentence belongs to the sentence.
    """
    try:
        value = RecipeLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    quoted = text.strip()[:1] in ("'", '"')
    return text if isinstance(value, str) and not quoted else value
