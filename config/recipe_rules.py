"""Which keys of a recipe contradict each other: every rule over more than one key that needs neither rows nor machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from config.scratch_rules import find_scratch_violations

if TYPE_CHECKING:
    from config.structured_config import MetricName, Recipe, TrainingSection


PAIR_METRICS: tuple[MetricName, ...] = ("preference_accuracy", "preference_accuracy_per_token", "reward_accuracy")


class RuleViolation(NamedTuple):
    """Two keys that are each fine but cannot stand together."""

    path: tuple[str, ...]
    message: str
    fix: str


class RecipeRuleError(ValueError):
    """Carries all broken cross-field rules at once through pydantic's ValidationError."""

    def __init__(self, violations: list[RuleViolation]) -> None:
        self.violations = violations
        super().__init__("; ".join(violation.message for violation in violations))


def find_rule_violations(recipe: Recipe) -> Iterator[RuleViolation]:
    """Yields every cross-field rule that the recipe breaks."""
    training, data, generation = recipe.training, recipe.data, recipe.generation
    yield from (RuleViolation(*broken) for broken in find_scratch_violations(recipe))
    if recipe.model.quantization != "none" and recipe.lora is None:
        message = f"{recipe.model.quantization} weights are frozen, so there is nothing to train without a lora section"
        yield RuleViolation(("model", "quantization"), message, "add a lora section, or set quantization: none")
    if training.packing and training.neftune_alpha is not None:
        message = "NEFTune's noise is scaled by the length of one example, which packing hides"
        yield RuleViolation(("training", "neftune_alpha"), message, "set packing: false, or remove neftune_alpha")
    if training.max_steps is not None and "epochs" in training.model_fields_set:
        message = "epochs and max_steps both say how long to train"
        yield RuleViolation(("training", "max_steps"), message, "keep one of the two")
    if isinstance(training.micro_batch_size, int) and training.micro_batch_size > training.batch_size:
        message = f"micro_batch_size {training.micro_batch_size} is larger than batch_size {training.batch_size}"
        yield RuleViolation(("training", "micro_batch_size"), message, "set it to batch_size or less, or to auto")
    if training.max_steps is not None:
        yield from find_cadence_violations(training, training.max_steps)
    if data.eval is None and data.eval_fraction == 0 and training.early_stopping_patience is not None:
        message = "early stopping needs held-out rows, and this recipe holds out none"
        yield RuleViolation(("training", "early_stopping_patience"), message, "set data.eval or data.eval_fraction")
    if "early_stopping_threshold" in training.model_fields_set and training.early_stopping_patience is None:
        message = "early_stopping_threshold does nothing without early_stopping_patience"
        yield RuleViolation(
            ("training", "early_stopping_threshold"), message, "set early_stopping_patience, or remove it"
        )
    yield from find_preference_violations(recipe)
    if data.eval is not None and "eval_fraction" in data.model_fields_set:
        message = "eval_fraction does nothing when data.eval names a file"
        yield RuleViolation(("data", "eval_fraction"), message, "remove one of the two")
    if data.overlong == "truncate" and data.loss_on == "all":
        message = "overlong: truncate cuts text that is not learned, and loss_on: all learns everything"
        yield RuleViolation(("data", "overlong"), message, "set overlong: drop or error, or loss_on: assistant")
    if data.strategy == "chat" and data.format == "text":
        message = "strategy chat needs conversations, and format text has none"
        yield RuleViolation(("data", "strategy"), message, "set strategy: standard, or convert the rows to messages")
    if generation.temperature == 0:
        for key, value in (("top_p", generation.top_p), ("top_k", generation.top_k)):
            if value is not None:
                message = f"{key} only acts when sampling, and temperature 0 is greedy"
                yield RuleViolation(("generation", key), message, f"set temperature above 0, or remove {key}")


def find_preference_violations(recipe: Recipe) -> Iterator[RuleViolation]:
    """Yields what cannot stand beside a method that learns from pairs, and what only such a method can have."""
    training, method = recipe.training, recipe.training.method
    for name, section in (("dpo", recipe.dpo), ("kto", recipe.kto), ("orpo", recipe.orpo)):
        if section is not None and method != name:
            message = f"the section {name} does nothing under method {method}"
            yield RuleViolation((name,), message, f"remove it, or set training.method: {name}")
    if not training.learns_pairs:
        for name in recipe.evaluation.metrics:
            if name in PAIR_METRICS:
                message = f"{name} compares the two answers of a pair, and method {method} has no pairs"
                yield RuleViolation(("evaluation", "metrics"), message, "remove it, or set training.method: dpo")
        return
    if recipe.orpo is not None and "reward_accuracy" in recipe.evaluation.metrics:
        message = (
            "reward_accuracy compares with the untouched model, and orpo learns without one: by the token, not the sum"
        )
        yield RuleViolation(("evaluation", "metrics"), message, "name preference_accuracy_per_token instead")
    if training.packing:
        message = "a pair already shares one row between its two answers, and packing is not built for that"
        yield RuleViolation(("training", "packing"), message, "set packing: false")
    if training.neftune_alpha is not None:
        message = "NEFTune's noise would differ between the two answers and the reference, and hide the preference"
        yield RuleViolation(("training", "neftune_alpha"), message, "remove neftune_alpha")
    if recipe.data.loss_on == "all":
        message = f"method {method} compares answers, and loss_on all would count their prompt as well"
        yield RuleViolation(("data", "loss_on"), message, "remove loss_on: the last answer is learned")
    if recipe.data.format not in ("auto", "preference"):
        message = f"method {method} learns from pairs, and format {recipe.data.format} has one answer"
        yield RuleViolation(("data", "format"), message, "set format: preference, or training.method: sft")
    if (dpo := recipe.dpo) is not None:
        if dpo.label_smoothing and dpo.loss != "sigmoid":
            message = f"label_smoothing is defined for the sigmoid loss, and loss is {dpo.loss}"
            yield RuleViolation(("dpo", "label_smoothing"), message, "set loss: sigmoid, or remove label_smoothing")
        if dpo.reference == "adapter_off" and recipe.lora is None:
            message = "without a lora section there is no adapter to switch off"
            yield RuleViolation(("dpo", "reference"), message, "set reference: precomputed, or add a lora section")


def find_cadence_violations(training: TrainingSection, total_steps: int) -> Iterator[RuleViolation]:
    """Yields an evaluation or save cadence that the run would never reach."""
    for key, every in (("eval_every", training.eval_every), ("save_every", training.save_every)):
        if isinstance(every, int) and every > total_steps:
            message = f"{key} {every} lies beyond the run's {total_steps} steps"
            yield RuleViolation(("training", key), message, f"set it to {total_steps} or less, or to epoch")
