"""Keys that are well-formed and do nothing here: one function for each, which returns it in words, or None."""

from __future__ import annotations

from typing import Literal

from config.recipe_rules import ON_ANSWERS
from utils.rule_checks import Facts


def find_text_loss_on(facts: Facts) -> str | None:
    """A choice among turns where no row has any."""
    if facts.formats.keys() != {"text"} or facts.recipe.data.loss_on != "last":
        return None
    return "loss_on: last does nothing: every row is raw text, of which all tokens are learned"


def find_unlearned_words(facts: Facts, key: Literal["template", "system"]) -> str | None:
    """Words around messages where no row has any: training never shows them, and inference would."""
    data = facts.recipe.data
    asked = data.system is not None if key == "system" else data.template != "auto"
    if facts.formats.keys() != {"text"} or not asked or facts.recipe.scratch:
        return None
    return f"every row is raw text, which stands alone: {key} is not learned, and only put around prompts in inference"


def find_idle_samples(facts: Facts) -> str | None:
    """Answers for the report that no metric asks the models for."""
    evaluation = facts.recipe.evaluation
    usual = type(evaluation).model_fields["samples"].default
    if evaluation.samples in (0, usual) or set(evaluation.metrics) & set(ON_ANSWERS):
        return None
    return f"samples {evaluation.samples} shows answers in the report, and no metric has any written"


def find_idle_project(facts: Facts) -> str | None:
    """A name for a tracker that is off."""
    tracking = facts.recipe.tracking
    is_usual = tracking.project == type(tracking).model_fields["project"].default
    return None if tracking.wandb or is_usual else f"project {tracking.project!r} is for wandb, which is off"
