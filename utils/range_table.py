"""Numbers outside the range that is usual in the field: a warning each, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from config.structured_config import Recipe
from utils.rule_checks import Facts
from utils.rule_table import Rule


@dataclass(frozen=True)
class Range:
    """Values of a key that are usual; `read` gives None where the key plays no part."""

    key: str
    low: float
    high: float
    read: Callable[[Recipe], float | None]
    fix: str


RANGES = (
    Range(
        "training.epochs",
        1,
        10,
        lambda recipe: recipe.training.epochs if recipe.training.max_steps is None else None,
        "1 to 3 epochs are usual; beyond 10 a model repeats its rows",
    ),
    Range(
        "training.batch_size",
        4,
        128,
        lambda recipe: recipe.training.batch_size,
        "8 to 16 is usual; it counts all examples of an optimizer step",
    ),
    Range("training.warmup_ratio", 0, 0.2, lambda recipe: recipe.training.warmup_ratio, "0.03 is usual"),
    Range("training.weight_decay", 0, 0.1, lambda recipe: recipe.training.weight_decay, "0 to 0.01 is usual"),
    Range(
        "training.neftune_alpha",
        5,
        15,
        lambda recipe: recipe.training.neftune_alpha,
        "set it from 5 to 15, or remove it",
    ),
    Range("lora.r", 8, 64, lambda recipe: recipe.lora.r if recipe.lora else None, "16 is usual"),
    Range(
        "lora.plus_ratio",
        1,
        32,
        lambda recipe: recipe.lora.plus_ratio if recipe.lora else None,
        "16 is usual; lower training.learning_rate beside it",
    ),
    Range("lora.dropout", 0, 0.2, lambda recipe: recipe.lora.dropout if recipe.lora else None, "0 to 0.1 is usual"),
)


def make_range_rule(usual: Range) -> Rule:
    """A warning outside a range."""

    def find(facts: Facts) -> str | None:
        value = usual.read(facts.recipe)
        if value is None or usual.low <= value <= usual.high:
            return None
        name = usual.key.rpartition(".")[2]
        return f"{name} {value:g} is outside the usual {usual.low:g} to {usual.high:g}"

    return Rule("warning", "unusual-value", usual.key, find, usual.fix)
