"""Which keys of a recipe contradict each other: every rule over more than one key that needs neither rows nor machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from config.engine_rules import find_engine_violations
from config.mlx_rules import find_backend_violations
from config.scratch_rules import find_scratch_violations

if TYPE_CHECKING:
    from config.structured_config import (
        DataSection,
        DpoSection,
        GenerationSection,
        LoraSection,
        MetricName,
        Recipe,
        TrainingSection,
    )


# Metrics that compare the two answers of a pair, and all that need a preference.
TWO_ANSWER_METRICS: tuple[MetricName, ...] = ("preference_accuracy", "preference_accuracy_per_token", "reward_accuracy")
PAIR_METRICS: tuple[MetricName, ...] = (*TWO_ANSWER_METRICS, "label_accuracy")
ON_ANSWERS: tuple[MetricName, ...] = ("exact_match", "execution_accuracy")  # the model writes them
REWARD_METRICS: tuple[MetricName, ...] = ("preference_accuracy",)  # a reward model predicts no tokens


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
    yield from (RuleViolation(*broken) for broken in find_scratch_violations(recipe))
    yield from find_adapter_violations(recipe)
    yield from find_training_violations(recipe.training)
    yield from (RuleViolation(*broken) for broken in find_engine_violations(recipe))
    yield from (RuleViolation(*broken) for broken in find_backend_violations(recipe))
    yield from find_preference_violations(recipe)
    yield from find_data_violations(recipe.data)
    if recipe.data.eval is None and recipe.data.eval_fraction == 0:
        yield from find_held_out_violations(recipe.training)
    yield from find_generation_violations(recipe.generation)


def find_training_violations(training: TrainingSection) -> Iterator[RuleViolation]:
    """Yields keys of section `training` that contradict each other."""
    if training.packing and training.neftune_alpha is not None:
        message = "NEFTune's noise is scaled by the length of one example, which packing hides"
        yield RuleViolation(("training", "neftune_alpha"), message, "set packing: false, or remove neftune_alpha")
    if training.packing and training.micro_batch_size != "auto":
        message = (
            "micro_batch_size does nothing under packing: each packed row of up to max_length tokens is a forward pass"
        )
        yield RuleViolation(("training", "micro_batch_size"), message, "remove it, or set packing: false")
    if training.max_steps is not None and "epochs" in training.model_fields_set:
        message = "epochs and max_steps both say how long to train"
        yield RuleViolation(("training", "max_steps"), message, "keep one of the two")
    if isinstance(training.micro_batch_size, int) and training.micro_batch_size > training.batch_size:
        message = f"micro_batch_size {training.micro_batch_size} is larger than batch_size {training.batch_size}"
        yield RuleViolation(("training", "micro_batch_size"), message, "set it to batch_size or less, or to auto")
    if training.max_steps is not None:
        yield from find_cadence_violations(training, training.max_steps)
    if "early_stopping_threshold" in training.model_fields_set and training.early_stopping_patience is None:
        message = "early_stopping_threshold does nothing without early_stopping_patience"
        yield RuleViolation(
            ("training", "early_stopping_threshold"), message, "set early_stopping_patience, or remove it"
        )


def find_held_out_violations(training: TrainingSection) -> Iterator[RuleViolation]:
    """Yields what a recipe that holds out no rows cannot have."""
    if training.early_stopping_patience is not None:
        message = "early stopping needs held-out rows, and this recipe holds out none"
        yield RuleViolation(("training", "early_stopping_patience"), message, "set data.eval or data.eval_fraction")
    if training.eval_every != "epoch":
        message = "eval_every needs held-out rows, and this recipe holds out none"
        yield RuleViolation(("training", "eval_every"), message, "remove it, or set data.eval or data.eval_fraction")


def find_data_violations(data: DataSection) -> Iterator[RuleViolation]:
    """Yields keys of section `data` that contradict each other."""
    if data.eval is not None and "eval_fraction" in data.model_fields_set:
        message = "eval_fraction does nothing when data.eval names a file"
        yield RuleViolation(("data", "eval_fraction"), message, "remove one of the two")
    if data.overlong == "truncate" and data.loss_on == "all":
        message = "overlong: truncate cuts text that is not learned, and loss_on: all learns everything"
        yield RuleViolation(("data", "overlong"), message, "set overlong: drop or error, or loss_on: assistant")
    if data.strategy == "chat" and data.format == "text":
        message = "strategy chat needs conversations, and format text has none"
        yield RuleViolation(("data", "strategy"), message, "set strategy: standard, or convert the rows to messages")


def find_generation_violations(generation: GenerationSection) -> Iterator[RuleViolation]:
    """Yields settings of sampling that greedy answers ignore."""
    for key, value in (("top_p", generation.top_p), ("top_k", generation.top_k)):
        if value is not None and generation.temperature == 0:
            message = f"{key} only acts when sampling, and temperature 0 is greedy"
            yield RuleViolation(("generation", key), message, f"set temperature above 0, or remove {key}")


def find_preference_violations(recipe: Recipe) -> Iterator[RuleViolation]:
    """Yields what cannot stand beside a method that learns from pairs, and what only such a method can have."""
    training, method = recipe.training, recipe.training.method
    for name, section in (
        ("dpo", recipe.dpo),
        ("kto", recipe.kto),
        ("orpo", recipe.orpo),
        ("reward", recipe.reward),
    ):
        if section is not None and method != name:
            message = f"the section {name} does nothing under method {method}"
            yield RuleViolation((name,), message, f"remove it, or set training.method: {name}")
    yield from find_metric_violations(recipe)
    if not training.learns_pairs:
        return
    yield from find_reward_violations(recipe)
    if training.packing:
        message = "a pair already shares one row between its two answers, and packing is not built for that"
        yield RuleViolation(("training", "packing"), message, "set packing: false")
    if training.neftune_alpha is not None:
        message = "NEFTune's noise would differ between the two answers and the reference, and hide the preference"
        yield RuleViolation(("training", "neftune_alpha"), message, "remove neftune_alpha")
    if recipe.data.loss_on == "all":
        message = f"method {method} compares answers, and loss_on all would count their prompt as well"
        yield RuleViolation(("data", "loss_on"), message, "remove loss_on: the last answer is learned")
    if recipe.data.format == "labelled" and recipe.kto is None:
        message = f"method {method} learns from pairs, and format labelled has one answer"
        yield RuleViolation(("data", "format"), message, "set training.method: kto, or format: preference")
    elif recipe.data.format not in ("auto", "preference", "labelled"):
        message = f"method {method} learns from pairs, and format {recipe.data.format} has one answer"
        yield RuleViolation(("data", "format"), message, "set format: preference, or training.method: sft")
    if recipe.dpo is not None:
        yield from find_dpo_violations(recipe.dpo, recipe.lora)


def find_dpo_violations(dpo: DpoSection, lora: LoraSection | None) -> Iterator[RuleViolation]:
    """Yields losses and references of DPO that cannot be had."""
    if dpo.label_smoothing and dpo.loss != "sigmoid":
        message = f"label_smoothing is defined for the sigmoid loss, and loss is {dpo.loss}"
        yield RuleViolation(("dpo", "label_smoothing"), message, "set loss: sigmoid, or remove label_smoothing")
    if dpo.reference == "adapter_off" and lora is None:
        message = "without a lora section there is no adapter to switch off"
        yield RuleViolation(("dpo", "reference"), message, "set reference: precomputed, or add a lora section")
    if dpo.reference == "adapter_off" and lora is not None and lora.variant == "pissa":
        message = "pissa takes a part out of the base, so without its adapter the base is no longer the reference"
        yield RuleViolation(("dpo", "reference"), message, "set reference: precomputed, or lora.variant: lora")


def find_reward_violations(recipe: Recipe) -> Iterator[RuleViolation]:
    """Yields what a model that writes nothing cannot do."""
    if recipe.training.method != "reward":
        return
    for name in recipe.evaluation.metrics:
        if name not in REWARD_METRICS:
            message = f"{name} looks at predicted tokens, and a reward model predicts none"
            yield RuleViolation(("evaluation", "metrics"), message, f"set metrics: [{', '.join(REWARD_METRICS)}]")
    if "generation" in recipe.model_fields_set:
        message = "the section generation does nothing under method reward: such a model writes no answers"
        yield RuleViolation(("generation",), message, "remove it")
    lora = recipe.lora
    for key, names in (
        (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)) if lora else ()
    ):
        if "lm_head" in names:
            message = "a reward model has no lm_head: its head is called score, and is always trained and saved"
            yield RuleViolation(("lora", key), message, "remove lm_head")
    if recipe.data.added_tokens:
        message = "added tokens are built for models that predict them, and a reward model predicts none"
        yield RuleViolation(("data", "added_tokens"), message, "remove it")


def find_metric_violations(recipe: Recipe) -> Iterator[RuleViolation]:
    """Yields metrics on preferences that the method cannot have."""
    training, path = recipe.training, ("evaluation", "metrics")
    for name in recipe.evaluation.metrics:
        if name in PAIR_METRICS and not training.learns_pairs:
            what = (
                "compares the two answers of a pair" if name in TWO_ANSWER_METRICS else "looks at good and bad answers"
            )
            fix = f"remove it, or set training.method: {'dpo' if name in TWO_ANSWER_METRICS else 'kto'}"
            yield RuleViolation(path, f"{name} {what}, and method {training.method} has none", fix)
        if name in ("reward_accuracy", "label_accuracy") and training.method == "orpo":
            message = (
                f"{name} compares with the untouched model, and orpo learns without one: by the token, not the sum"
            )
            yield RuleViolation(path, message, "name preference_accuracy_per_token instead")


def find_cadence_violations(training: TrainingSection, total_steps: int) -> Iterator[RuleViolation]:
    """Yields an evaluation or save cadence that the run would never reach."""
    for key, every in (("eval_every", training.eval_every), ("save_every", training.save_every)):
        if isinstance(every, int) and every > total_steps:
            message = f"{key} {every} lies beyond the run's {total_steps} steps"
            yield RuleViolation(("training", key), message, f"set it to {total_steps} or less, or to epoch")


def find_adapter_violations(recipe: Recipe) -> Iterator[RuleViolation]:
    """Yields what cannot stand together in bases, adapters and added tokens."""
    model, lora, tokens = recipe.model, recipe.lora, recipe.data.added_tokens
    if model.quantization != "none" and lora is None:
        message = f"{model.quantization} weights are frozen, so there is nothing to train without a lora section"
        yield RuleViolation(("model", "quantization"), message, "add a lora section, or set quantization: none")
    if lora is None and model.dtype not in ("auto", "float32"):
        message = f"all weights are trained, and {model.dtype} numbers would lose small updates: they are float32"
        fix = "remove dtype" if model.init == "scratch" else "remove dtype, or add a lora section"
        yield RuleViolation(("model", "dtype"), message, fix)
    if model.quantization != "none" and model.adapter is not None:
        message = f"an adapter folded into {model.quantization} weights would be rounded to their few values"
        fix = "merge it first (scripts/merge.py), and name the merged folder in model.name"
        yield RuleViolation(("model", "adapter"), message, fix)
    if lora is not None and lora.variant == "pissa" and model.quantization != "none":
        message = f"pissa takes the largest singular values out of the base, and {model.quantization} weights cannot give them"
        yield RuleViolation(("lora", "variant"), message, "set model.quantization: none, or lora.variant: lora")
    if lora is not None and lora.variant == "dora" and model.quantization == "int8" and recipe.backend != "mlx":
        message = "dora reads the base's weights at every step, and 8-bit modules lose their scales when it does"
        yield RuleViolation(("lora", "variant"), message, "set model.quantization: nf4, or lora.variant: lora")
    if lora is not None and not isinstance(lora.target_modules, str):
        for name in sorted({*lora.modules_to_save} & {*lora.target_modules}):
            message = f"{name} cannot be trained whole and carry an adapter"
            yield RuleViolation(("lora", "modules_to_save"), message, "keep it in one of the two lists")
    for token in sorted({token for token in tokens if tokens.count(token) > 1}):
        yield RuleViolation(("data", "added_tokens"), f"{token!r} stands there twice", "remove one")
    for token in (token for token in tokens if token != token.strip()):
        message = f"{token!r} begins or ends with white space, which tokenizers cut off"
        yield RuleViolation(("data", "added_tokens"), message, "write it without")
