"""Reads a recipe, applies `--set`, reports every problem with its line, and writes the resolved snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from config.recipe_errors import OVERRIDE, explain_value, iterate_schema_keys, translate_errors
from config.recipe_rules import RecipeRuleError, RuleViolation
from config.structured_config import PAIR_METHODS, Recipe
from config.yaml_reader import RecipeDumper, YamlDocument, parse_value, read_yaml
from utils.exceptions import Problem, RecipeError, TunebookError

SectionType = TypeVar("SectionType", bound=BaseModel)


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
        """Returns a copy in which a rule has set `section.key`, or a key at the top, with the reason as its origin."""
        section, _, name = key.rpartition(".")
        values = self.recipe.model_dump(exclude_unset=True)
        (values.setdefault(section, {}) if section else values)[name] = value
        recipe = build_recipe(values, self.find_origin)
        return replace(self, recipe=recipe, origins={**self.origins, key: f"auto: {reason}"})


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads and validates a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value` texts from `--set`, applied in order; values are read as YAML.

    Raises:
        RecipeError: everything that is wrong with it, all at once, each with `file:line`.
    """
    path = Path(path)
    return check_document(read_yaml(path), path, overrides)


def check_document(document: YamlDocument, path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Validates what stands in a recipe file, or what shall stand in one that does not exist yet.

    Raises:
        RecipeError: everything that is wrong with it, all at once, each with `file:line`.
    """
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


def build_recipe(values: dict[str, Any], find_origin: Callable[[str], str]) -> Recipe:
    """A recipe out of values that stand in no file.

    Args:
        find_origin: dotted key → the place where a user would change it.

    Raises:
        RecipeError: everything that is wrong with the values.
    """
    try:
        return Recipe(**values)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, RecipeRuleError):
                problems += list_rule_problems(cause.violations, find_origin)
            else:
                keys = tuple(str(part) for part in detail["loc"][:2])
                problems.append(explain_value(keys, [detail], find_origin(".".join(keys))))
        raise RecipeError.from_problems(problems) from None


@contextmanager
def locate_problems(loaded: LoadedRecipe) -> Iterator[None]:
    """Gives problems that name a key of the recipe its line: what knows the key alone need not carry the file about."""
    try:
        yield
    except TunebookError as error:
        known = set(iterate_schema_keys(Recipe))
        problems = [
            replace(problem, where=loaded.find_origin(problem.where)) if problem.where in known else problem
            for problem in error.problems
        ]
        raise type(error).from_problems(problems) from error


def list_rule_problems(violations: Iterable[RuleViolation], find_origin: Callable[[str], str]) -> list[Problem]:
    """Broken rules as problems with their places."""
    return [Problem("rule", broken.message, find_origin(".".join(broken.path)), broken.fix) for broken in violations]


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
        if name in PAIR_METHODS and value is None:
            continue  # the section of another method
        if name == "generation" and loaded.recipe.reward:
            continue  # such a model writes no answers
        if name == "scratch" and value is None:
            continue  # a pretrained model
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
        or (section == "data" and key == "max_length" and not is_settled(recipe))
    )


def is_settled(recipe: Recipe) -> bool:
    """True unless `data.max_length` is still to become the length of a new model's windows."""
    return recipe.scratch is None or recipe.data.max_length == recipe.scratch.context


def format_line(key: str, value: Any, origin: str, indent: str) -> str:
    """One `key: value  # origin` line in YAML flow style."""
    text = yaml.dump(
        {key: value}, Dumper=RecipeDumper, default_flow_style=True, width=10_000, allow_unicode=True
    ).strip()[1:-1]
    return f"{indent}{text}  # {origin}"
