"""Reads a recipe, applies `--set`, reports every problem with its line, and writes the resolved snapshot."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from config.foreign_names import FOREIGN_NAMES
from config.structured_config import Recipe, RecipeRuleError
from config.yaml_reader import KeyPath, RecipeDumper, YamlDocument, parse_value, read_yaml
from utils.exceptions import Problem, RecipeError

SectionType = TypeVar("SectionType", bound=BaseModel)
OVERRIDE = "--set"


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe together with where each of its values came from.

    Attributes:
        recipe: the frozen, validated values.
        path: the YAML file.
        origins: dotted key → `file:line`, `--set`, `default` or `auto: <reason>`.
    """

    recipe: Recipe
    path: Path
    origins: dict[str, str]

    @property
    def name(self) -> str:
        """The recipe's file name without its ending: names the folder under outputs/."""
        return self.path.stem

    def find_origin(self, key: str) -> str:
        """Where to point a user who must change `key`: its line, else the nearest section's line, else the file."""
        parts = key.split(".")
        while parts:
            origin = self.origins.get(".".join(parts), "")
            if origin == OVERRIDE:
                return f"{OVERRIDE} {'.'.join(parts)}"
            if origin and origin != "default" and not origin.startswith("auto"):
                return origin
            parts.pop()
        return str(self.path)

    def with_automatic_value(self, key: str, value: Any, reason: str) -> LoadedRecipe:
        """Returns a copy in which a rule has set `section.key`, with the reason as its origin."""
        section_name, field_name = key.split(".")
        values = self.recipe.model_dump(exclude_unset=True)
        values.setdefault(section_name, {})[field_name] = value
        return replace(self, recipe=Recipe(**values), origins={**self.origins, key: f"auto: {reason}"})


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads and validates a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value` texts from `--set`, applied in order; values are read as YAML.

    Raises:
        RecipeError: everything that is wrong with it, all at once, each with `file:line`.
    """
    path = Path(path)
    document = read_yaml(path)
    origins = {".".join(keys): f"{path}:{line}" for keys, line in document.lines.items() if keys}
    for override in overrides:
        origins[apply_override(document, override)] = OVERRIDE
    refuse_empty_sections(document, path)
    try:
        recipe = Recipe(**document.values)
    except ValidationError as error:
        raise RecipeError.from_problems(list(translate_errors(error, document, path, origins))) from None
    for key in iterate_keys(recipe):
        origins.setdefault(key, "default")
    return LoadedRecipe(recipe, path, origins)


def refuse_empty_sections(document: YamlDocument, path: Path) -> None:
    """`lora:` with every line below it commented out would otherwise mean «train all weights»."""
    sections = {key.split(".")[0] for key in iterate_schema_keys(Recipe) if "." in key}
    problems = [
        Problem(
            "empty-section",
            f"{name} is empty",
            f"{path}:{document.lines.get((name,), 1)}",
            "fill it, or remove the line",
        )
        for name, value in document.values.items()
        if name in sections and value is None
    ]
    if problems:
        raise RecipeError.from_problems(problems)


def load_values(section: type[SectionType], document: YamlDocument, name: str) -> SectionType:
    """Validates one section on its own, with the same errors as in a recipe."""
    try:
        return section(**document.values.get(name, {}))
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            keys = (name, *(str(part) for part in detail["loc"][:1]))
            problems.append(explain_value(keys, [detail], f"{OVERRIDE} {'.'.join(keys)}"))
        raise RecipeError.from_problems(problems) from None


def apply_override(document: YamlDocument, override: str) -> str:
    """Writes one `section.key=value` into the document and returns its dotted key."""
    key, equals, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(
            f"--set {override!r} is not section.key=value", fix="write --set training.epochs=2", code="override"
        )
    value = parse_value(text)
    section = document.values
    for name in keys[:-1]:
        inner = section.setdefault(name, {})
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{name} holds a value, not a section", where=f"--set {key}", code="override")
        section = inner
    section[keys[-1]] = value
    return ".".join(keys)


def iterate_keys(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yields the dotted name of every value in the recipe."""
    for name in type(section).model_fields:
        value = section.__dict__[name]
        if isinstance(value, BaseModel):
            yield from iterate_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def translate_errors(
    error: ValidationError, document: YamlDocument, path: Path, origins: dict[str, str]
) -> Iterator[Problem]:
    """Turns pydantic's report into problems with lines, one for each key, in the order of the file."""
    grouped: dict[KeyPath, list[Any]] = {}
    for detail in error.errors():
        rule_error = detail.get("ctx", {}).get("error")
        if isinstance(rule_error, RecipeRuleError):
            for violation in rule_error.violations:
                where = find_place(violation.path, document, path, origins)
                yield Problem("rule", violation.message, where, violation.fix)
        else:
            grouped.setdefault(trim_to_keys(detail["loc"], document.values, detail["type"]), []).append(detail)
    found = [
        explain_value(keys, details, find_place(keys, document, path, origins)) for keys, details in grouped.items()
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
        if not isinstance(values, dict) or (part not in values and kind != "missing"):
            break
        keys.append(str(part))
        values = values.get(part)
    return tuple(keys)


def explain_value(keys: KeyPath, details: list[Any], where: str) -> Problem:
    """One problem for one key: unknown, missing, or a value that none of the allowed shapes fits."""
    dotted, kinds = ".".join(keys), {detail["type"] for detail in details}
    if "extra_forbidden" in kinds:
        return explain_unknown_key(keys, where)
    if "missing" in kinds:
        return Problem("missing-key", f"{dotted} is required", where, f"add `{keys[-1]}:`{in_section(keys)}")
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


def format_resolved(loaded: LoadedRecipe) -> str:
    """The complete recipe as YAML, each line with its origin: what really ran, and why.

    The text is itself a valid recipe; a key whose value conflicts with one that is set (epochs beside max_steps) is left out.
    """
    values = loaded.recipe.model_dump(mode="json")
    lines = [f"# Resolved from {loaded.path}. Every value names its origin."]
    for name, value in values.items():
        if name == "lora" and value is None:
            lines.append("# no lora section: all weights are trained")
            continue
        if not isinstance(value, dict):
            lines.append(format_line(name, value, loaded.origins.get(name, "default"), indent=""))
            continue
        lines.append(f"{name}:")
        for key, inner in value.items():
            if not is_default_shadowed(loaded.recipe, name, key):
                lines.append(format_line(key, inner, loaded.origins.get(f"{name}.{key}", "default"), indent="  "))
    return "\n".join(lines) + "\n"


def is_default_shadowed(recipe: Recipe, section: str, key: str) -> bool:
    """True for a default that writing out would turn into a contradiction."""
    return (
        (section == "training" and key == "epochs" and recipe.training.max_steps is not None)
        or (
            section == "training"
            and key == "early_stopping_threshold"
            and recipe.training.early_stopping_patience is None
        )
        or (section == "data" and key == "eval_fraction" and recipe.data.eval is not None)
    )


def format_line(key: str, value: Any, origin: str, indent: str) -> str:
    """One `key: value  # origin` line in YAML flow style."""
    text = yaml.dump(
        {key: value}, Dumper=RecipeDumper, default_flow_style=True, width=10_000, allow_unicode=True
    ).strip()[1:-1]
    return f"{indent}{text}  # {origin}"
