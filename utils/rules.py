"""Applies the rules of the field (`rule_table.py`, `range_table.py`) to what is known so far."""

from __future__ import annotations

from collections.abc import Callable

from config.recipe_io import LoadedRecipe
from utils.exceptions import Problem, RecipeError
from utils.range_table import RANGES, make_range_rule
from utils.rule_checks import Facts
from utils.rule_table import RULES


def find_problems(facts: Facts, find_origin: Callable[[str], str]) -> list[Problem]:
    """Applies every rule and range to what is known.

    Args:
        find_origin: dotted key → `file:line`.

    Returns:
        Errors first, then warnings, each group in the order of the table.
    """
    found = []
    for rule in (*RULES, *(make_range_rule(each) for each in RANGES)):
        message = rule.find(facts)
        if message is not None:
            fix = rule.fix if isinstance(rule.fix, str) else rule.fix(facts)
            found.append(Problem(rule.code, message, find_origin(rule.key), fix, rule.severity))
    return sorted(found, key=lambda problem: problem.severity == "warning")


def apply_rules(loaded: LoadedRecipe, facts: Facts) -> list[Problem]:
    """Applies the table of rules to what is known so far.

    Returns:
        The warnings.

    Raises:
        RecipeError: all errors together.
    """
    problems = find_problems(facts, loaded.find_origin)
    if errors := [problem for problem in problems if problem.severity == "error"]:
        raise RecipeError.from_problems(errors)
    return problems
