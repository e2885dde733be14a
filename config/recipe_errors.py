"""Turns pydantic's report on a recipe into problems that a user can act on: the line, what is wrong, what to write."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from config.foreign_names import FOREIGN_NAMES
from config.recipe_rules import RecipeRuleError
from config.structured_config import DataSource, Recipe
from config.yaml_reader import KeyPath, YamlDocument
from utils.exceptions import Problem

OVERRIDE = "--set"
UNION_TAGS = ("text", "section", "list")  # of the shapes that data.train can have; they are not keys


def translate_errors(
    error: ValidationError, document: YamlDocument, path: Path, origins: dict[str, str]
) -> Iterator[Problem]:
    """Turns pydantic's report into problems with lines, one for each key, in the order of the file."""
    grouped: dict[tuple[KeyPath, str], list[Any]] = {}
    for detail in error.errors():
        rule_error = detail.get("ctx", {}).get("error")
        if isinstance(rule_error, RecipeRuleError):
            for violation in rule_error.violations:
                where = find_place(violation.path, document, path, origins)
                yield Problem("rule", violation.message, where, violation.fix)
        else:
            keys = trim_to_keys(detail["loc"], document.values, detail["type"])
            grouped.setdefault((keys, name_entry(detail["loc"][len(keys) :])), []).append(detail)
    inside = {keys for keys, entry in grouped if entry}
    found = [
        explain_value(keys, details, find_place(keys, document, path, origins), entry)
        for (keys, entry), details in grouped.items()
        if entry or keys not in inside  # a list with a bad entry also counts as too short
    ]
    yield from sorted(found, key=lambda problem: find_line(problem.where))


def find_line(where: str | None) -> int:
    """The line of a `file:line`, or 0."""
    line = (where or "").rpartition(":")[2]
    return int(line) if line.isdigit() else 0


def find_place(keys: KeyPath, document: YamlDocument, path: Path, origins: dict[str, str]) -> str:
    """The line of a key, or of the nearest section that exists in the file."""
    dotted = ".".join(keys)
    for key, origin in origins.items():
        if origin == OVERRIDE and (key == dotted or (keys not in document.lines and key.startswith(f"{dotted}."))):
            return f"{OVERRIDE} {key}"
    while keys and keys not in document.lines:
        keys = keys[:-1]
    return f"{path}:{document.lines[keys]}"


def trim_to_keys(location: tuple[int | str, ...], values: Any, kind: str) -> KeyPath:
    """Drops pydantic's union-branch names and list indices from a location: only real keys stay."""
    keys: list[str] = []
    for part in location:
        if part in UNION_TAGS or not isinstance(values, dict) or (part not in values and kind != "missing"):
            break
        keys.append(str(part))
        values = values.get(part)
    return tuple(keys)


def name_entry(location: tuple[int | str, ...]) -> str:
    """The rest of a location below a key, as a user would write it: `[0].weight`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location if part not in UNION_TAGS]
    return "".join(parts) if any(part in UNION_TAGS for part in location) else ""


def explain_value(keys: KeyPath, details: list[Any], where: str, entry: str = "") -> Problem:
    """One problem for one key: unknown, missing, or a value that none of the allowed shapes fits.

    Args:
        entry: what below the key is meant, such as `[0].weight` of a list of sources.
    """
    dotted, kinds = ".".join(keys) + entry, {detail["type"] for detail in details}
    if "extra_forbidden" in kinds:
        return explain_unknown_entry(dotted, where) if entry else explain_unknown_key(keys, where)
    if "missing" in kinds:
        name = dotted.rpartition(".")[2]
        place = "" if entry else in_section(keys)
        return Problem("missing-key", f"{dotted} is required", where, f"add `{name}:`{place}")
    got = details[0]["input"]
    if kinds & {"model_type", "model_attributes_type", "dict_type"} and not isinstance(got, dict):
        return Problem("wrong-type", f"{dotted} must be a section with keys, not {shorten(got)}", where)
    wanted = dict.fromkeys(describe_expectation(detail) for detail in details)
    message = f"{dotted} must be {' or '.join(wanted)}, not {shorten(got)}"
    return Problem("bad-value", message, where, suggest_choice(got, details))


def in_section(keys: KeyPath) -> str:
    """Where a missing key belongs."""
    return f" under `{keys[-2]}:`" if len(keys) > 1 else " at the top level"


def describe_expectation(detail: Any) -> str:
    """What pydantic wanted, in a user's words."""
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        return f"one of {context['expected'].replace(chr(39), '')}"
    fixed = {
        "int_type": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "none_required": "null",
        "finite_number": "a finite number",
        "too_short": "a list with at least one entry",
        "string_too_short": "text that is not empty",
    }
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [f"{word} {context[sign]}" for sign, word in signs.items() if sign in context]
    return fixed.get(detail["type"]) or " and ".join(bounds) or detail["msg"].lower()


def suggest_choice(got: Any, details: list[Any]) -> str | None:
    """Did-you-mean for a misspelt choice."""
    for detail in details:
        if detail["type"] == "literal_error" and isinstance(got, str):
            choices = detail["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            if near := difflib.get_close_matches(got, choices, n=1):
                return f"did you mean {near[0]}?"
    return None


def explain_unknown_entry(dotted: str, where: str) -> Problem:
    """An unknown key inside a data source."""
    names = list(DataSource.model_fields)
    near = difflib.get_close_matches(dotted.rpartition(".")[2], names, n=1, cutoff=0.6)
    fix = f"did you mean {near[0]}?" if near else f"remove it; keys here: {', '.join(names)}"
    return Problem("unknown-key", f"unknown key {dotted}", where, fix)


def explain_unknown_key(keys: KeyPath, where: str) -> Problem:
    """Names the key that was meant: a typo, the right section, or another tool's word for ours."""
    name, known = keys[-1], list(iterate_schema_keys(Recipe))
    if name in FOREIGN_NAMES:
        fix = FOREIGN_NAMES[name]
    elif others := [key for key in known if key.split(".")[-1] == name]:
        fix = f"here it is {others[0]}"
    else:
        siblings = [key.split(".")[-1] for key in known if key.split(".")[:-1] == list(keys[:-1])]
        near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
        near_anywhere = difflib.get_close_matches(name, [key.split(".")[-1] for key in known], n=1, cutoff=0.75)
        if near:
            fix = f"did you mean {near[0]}?"
        elif near_anywhere:
            fix = f"did you mean {next(k for k in known if k.split('.')[-1] == near_anywhere[0])}?"
        else:
            fix = f"remove it; keys here: {', '.join(siblings)}" if siblings else "remove it"
    return Problem("unknown-key", f"unknown key {'.'.join(keys)}", where, fix)


def iterate_schema_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields every key that a recipe may hold, sections included."""
    for name, info in schema.model_fields.items():
        yield f"{prefix}{name}"
        for candidate in (info.annotation, *get_args(info.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from iterate_schema_keys(candidate, f"{prefix}{name}.")


def shorten(value: Any) -> str:
    """A value as a user would recognise it in the file, at most 60 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
