"""Small sets: what `training.small_data` fills in for a recipe with fewer than 200 training examples.

With 40 rows, three epochs of batches of 16 are nine optimizer steps: next to nothing is learned, and nothing says so. A rule
never touches a value that the recipe sets, and each value that it fills in carries its reason. docs/results/small_data.md
compares them: on 40 rows the adaptive values win on each of three tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from config.recipe_io import LoadedRecipe
from config.structured_config import Recipe
from utils.logging import get_logger

FEW, VERY_FEW = 200, 100  # training examples: fewer than these
METHODS = ("sft",)  # the numbers were measured for it; preference methods overfit within 2 to 3 epochs
HELD_OUT_ROWS = 5  # fewer say next to nothing
MAX_HELD_OUT_SHARE = 0.2
# The older, milder numbers that users know: they suit all-weight training of a chat model more than adapters.
GENTLE = {
    "training.learning_rate": 3.5e-5,
    "training.epochs": 8.0,
    "training.warmup_ratio": 0.05,
    "training.neftune_alpha": 0.05,
    "training.early_stopping_patience": 7,
}


class Change(NamedTuple):
    """One value that a rule would fill in, and why."""

    key: str
    value: Any
    reason: str


def adapt_to_small_data(loaded: LoadedRecipe, examples: int, rows: int) -> LoadedRecipe:
    """Fills in what the recipe leaves out, where its training set is small.

    Args:
        examples: training examples after encoding.
        rows: rows of `data.train`, held-out ones included.

    Returns:
        The recipe itself, or a copy in which each filled value has `auto: <reason>` as its origin.
    """
    training = loaded.recipe.training
    if training.small_data == "off" or examples >= FEW or training.method not in METHODS:
        if training.small_data == "gentle":
            message = (
                "training.small_data: gentle changes nothing: it is for sft below %d training examples, here are %d"
            )
            get_logger().warning(message, FEW, examples)
        return loaded
    changes = propose_gentle_values(loaded.recipe, examples) if training.small_data == "gentle" else iter(())
    proposed = [*changes, *propose_values(loaded.recipe, examples, rows)]
    for change in proposed:
        if not is_set(loaded.recipe, change.key):
            loaded = loaded.with_automatic_value(change.key, change.value, change.reason)
    return loaded


def is_set(recipe: Recipe, key: str) -> bool:
    """True if the recipe, a `--set` or an earlier rule gave `section.key` its value."""
    section, name = key.split(".")
    return name in {"data": recipe.data, "training": recipe.training}[section].model_fields_set


def propose_values(recipe: Recipe, examples: int, rows: int) -> Iterator[Change]:
    """Yields the adaptive values: more epochs, smaller batches, more held-out rows.

    Warmup, noise and patience need no rule: their defaults (3 %, off, never stop) are at the careful end already.
    """
    training, data = recipe.training, recipe.data
    few = f"{examples} training examples are few"
    epochs, batch_size = (10.0, 4) if examples < VERY_FEW else (8.0, 8)
    if training.max_steps is None:  # else the recipe says how long to train
        if training.epochs < epochs:
            yield Change("training.epochs", epochs, f"{few}, so they are seen more often")
        if isinstance(training.micro_batch_size, int):
            batch_size = max(batch_size, training.micro_batch_size)
        if training.batch_size > batch_size:
            yield Change("training.batch_size", batch_size, f"{few}, so steps are smaller and more")
    share = round(min(MAX_HELD_OUT_SHARE, HELD_OUT_ROWS / rows), 4)
    if data.eval is None and 0 < data.eval_fraction < share:
        yield Change("data.eval_fraction", share, f"{rows} rows are few, so more of them are held out to judge by")


def propose_gentle_values(recipe: Recipe, examples: int) -> Iterator[Change]:
    """Yields the named profile `gentle`, whose numbers are taken as they are."""
    training, data = recipe.training, recipe.data
    impossible = set()
    if training.max_steps is not None:
        impossible.add("training.epochs")
    if training.packing or training.engine == "trl":
        impossible.add("training.neftune_alpha")
    if data.eval is None and data.eval_fraction == 0:
        impossible.add("training.early_stopping_patience")
    for key, value in GENTLE.items():
        if key not in impossible:
            yield Change(key, value, f"profile gentle, {examples} training examples")
