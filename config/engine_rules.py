"""Which keys contradict `training.engine: trl`: what TRL's trainer would do otherwise is refused, never ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from config.structured_config import Recipe

# What is broken: the key, a message and a fix, as `RuleViolation` of config/recipe_rules.py has them.
Broken = tuple[tuple[str, ...], str, str]
METHODS = ("sft", "dpo")


def find_engine_violations(recipe: Recipe) -> Iterator[Broken]:
    """Yields every key that only our own loop honours."""
    training, data, fix = recipe.training, recipe.data, "or set training.engine: tunebook"
    if training.engine != "trl":
        return
    if training.method not in METHODS:
        message = f"engine trl runs {' and '.join(METHODS)}, and method is {training.method}"
        yield ("training", "engine"), message, "set training.engine: tunebook"
    if training.packing:
        message = "TRL takes equally many forward passes in every step, and packing fills a varying number of rows"
        yield ("training", "packing"), message, f"set packing: false, {fix}"
    if training.neftune_alpha is not None:
        message = "TRL scales NEFTune's noise by the padded length of a row, and this recipe means the real one"
        yield ("training", "neftune_alpha"), message, f"remove neftune_alpha, {fix}"
    if recipe.dpo and recipe.dpo.label_smoothing:
        message = "TRL's sigmoid loss has no label smoothing"
        yield ("dpo", "label_smoothing"), message, f"remove label_smoothing, {fix}"
    if recipe.dpo and recipe.dpo.reference == "model" and recipe.model.quantization != "none":
        message = f"TRL cannot copy {recipe.model.quantization} weights for a reference of their own"
        yield ("dpo", "reference"), message, f"set reference: adapter_off, {fix}"
    if recipe.dpo and recipe.lora and recipe.lora.variant == "pissa":
        message = "TRL adds a second adapter for the reference, and PiSSA would take it out of the base once more"
        yield ("lora", "variant"), message, f"set variant: lora, {fix}"
    if recipe.lora and "lm_head" in recipe.lora.target_modules:
        message = "TRL computes the loss from the head's own weights, so an adapter on it would never be trained"
        yield ("lora", "target_modules"), message, f"remove lm_head, {fix}"
    if data.added_tokens:
        message = "TRL computes the loss from the head's own weights, so the rows of added tokens would not be learned"
        yield ("data", "added_tokens"), message, f"remove added_tokens, {fix}"
