"""Checks of the pre-flight that need a model's name, the rows or their tokens, and no weights."""

from __future__ import annotations

from config.model_families import ModelFamily
from config.recipe_io import LoadedRecipe
from config.recipe_rules import ON_ANSWERS
from utils.exceptions import DataError, Problem, RecipeError
from utils.hub import explain_errors, find_snapshot
from utils.logging import hide_in_values
from utils.methods.pairs import have_one_prompt
from utils.model_source import is_on_hub
from utils.prepared_data import PreparedData, iterate_held_out
from utils.row_checks import RowScan


def guess_chat_template(loaded: LoadedRecipe, family: ModelFamily | None) -> bool | None:
    """Whether the family of a model has a chat template; None where the model's files are here and speak for themselves."""
    model = loaded.recipe.model
    if family is None or not is_on_hub(model.name):
        return None
    with explain_errors(model, loaded.find_origin("model.name")):
        return None if find_snapshot(model, with_weights=False, trust=True) else family.has_chat_template


def check_secrets(loaded: LoadedRecipe) -> None:
    """Refuses a recipe that holds a secret: the run folder keeps the recipe, and without the secret it would be another one.

    Raises:
        RecipeError: the value of a key is, or contains, a token, the value of a secret variable, or a password in an address.
    """
    problems = [
        Problem(
            "secret",
            f"{section}.{key} holds what looks like a secret, and a run keeps its recipe",
            loaded.find_origin(f"{section}.{key}"),
            "take it out; tokens belong into the environment or into .env",
        )
        for section, values in loaded.recipe.model_dump(mode="json").items()
        if isinstance(values, dict)
        for key, value in values.items()
        if hide_in_values(value) != value
    ]
    if problems:
        raise RecipeError.from_problems(problems)


def check_metrics(loaded: LoadedRecipe, scan: RowScan) -> None:
    """Metrics on answers need rows with answers; execution accuracy needs a database in each row."""
    metrics = loaded.recipe.evaluation.metrics
    generated = [name for name in metrics if name in ON_ANSWERS]
    for example in iterate_held_out(loaded, scan) if generated else ():
        if example.text is not None:
            fix = "remove it from evaluation.metrics"
            raise DataError(f"{generated[0]} needs answers, and this row is raw text", where=example.where, fix=fix)
        if example.label is False:
            fix = "remove it from evaluation.metrics, or hold out rows with label true"
            message = f"{generated[0]} needs good answers to compare with, and this row's has label false"
            raise DataError(message, where=example.where, fix=fix)
        if "execution_accuracy" in metrics and not isinstance(example.fields.get("database"), str):
            fix = 'add "database": an SQL script that creates and fills the tables, or remove the metric'
            raise DataError("execution_accuracy needs a `database` in each held-out row", where=example.where, fix=fix)


def check_prompts(loaded: LoadedRecipe, data: PreparedData) -> None:
    """KTO compares an answer with answers to other prompts, in training and in evaluation."""
    if loaded.recipe.kto is None:
        return
    for name, pairs in (("training", data.train), ("held-out", data.evaluation)):
        if len(pairs) and have_one_prompt(pairs):
            fix = "add rows: KTO compares each answer with one that belongs to another prompt"
            where = pairs[0].where
            raise DataError(f"KTO needs {name} rows with two prompts or more", where=where, fix=fix, code="few-rows")
