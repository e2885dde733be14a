"""The rules of the field in one table: what a recipe may not do, and what it may but rarely should.

A rule is data and a small function that looks at `Facts`. What is not known yet is None, and a rule that needs it stays
silent: the same table serves the recipe alone (at once), and the recipe with model and rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from config.recipe_rules import ON_ANSWERS
from utils.idle_key_checks import find_idle_project, find_idle_samples, find_text_loss_on, find_unlearned_words
from utils.label_checks import (
    choose_weight,
    find_imbalance,
    find_labelled_rows,
    find_no_desirable_answer,
    find_one_label,
    find_two_answer_metric,
)
from utils.rule_checks import (
    Facts,
    find_8bit_elsewhere,
    find_answer_beyond_positions,
    find_beyond_positions,
    find_far_alpha,
    find_far_learning_rate,
    find_few_held_out,
    find_few_steps,
    find_foreign_tokenizer,
    find_leaking_pack,
    find_long_step,
    find_lora_target,
    find_no_chat_template,
    find_no_held_out,
    find_no_pairs,
    find_no_preference_metric,
    find_preference_rows,
    find_raw_text,
    find_reward_model,
    find_unknown_module,
    find_usual_rate,
    list_modules,
    name_preference_metrics,
    show_pair_rows,
)


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        severity: an error stops the run.
        code: stable name for scripts and tests.
        key: dotted key that the user would change.
        find: returns what is wrong in words, or None.
        fix: what to do about it, in words or made from the facts.
    """

    severity: Literal["error", "warning"]
    code: str
    key: str
    find: Callable[[Facts], str | None]
    fix: str | Callable[[Facts], str]


RULES = (
    Rule(
        "error",
        "no-chat-template",
        "data.strategy",
        find_no_chat_template,
        "set data.strategy: standard, name a template in data.template, or choose an instruction-tuned model",
    ),
    Rule(
        "error",
        "adamw-8bit",
        "training.optimizer",
        find_8bit_elsewhere,
        "set training.optimizer: adamw, or adafactor where all weights are trained and memory is short",
    ),
    Rule("error", "lora-target", "lora.target_modules", find_lora_target, list_modules),
    Rule(
        "error",
        "unknown-module",
        "lora.modules_to_save",
        find_unknown_module,
        lambda facts: f"modules here: {', '.join(facts.whole_modules)}",
    ),
    Rule(
        "error",
        "preference-rows",
        "data.train",
        find_preference_rows,
        "set training.method: dpo; or keep the chosen answers alone, written as messages or as prompt and completion",
    ),
    Rule(
        "error",
        "no-pairs",
        "data.train",
        find_no_pairs,
        show_pair_rows,
    ),
    Rule(
        "error",
        "labelled-rows",
        "data.train",
        find_labelled_rows,
        lambda facts: (
            "set training.method: kto"
            if facts.recipe.training.learns_pairs
            else "keep the rows with label true alone and remove their label, or set training.method: kto"
        ),
    ),
    Rule(
        "error",
        "two-answer-metric",
        "evaluation.metrics",
        find_two_answer_metric,
        "name label_accuracy instead, or hold out pairs",
    ),
    Rule(
        "error",
        "no-desirable-answer",
        "evaluation.metrics",
        find_no_desirable_answer,
        "name label_accuracy alone, or hold out rows with label true",
    ),
    Rule(
        "warning",
        "one-label",
        "data.train",
        find_one_label,
        "add rows with the other label; good answers alone are for training.method: sft",
    ),
    Rule("warning", "label-balance", "kto.desirable_weight", find_imbalance, choose_weight),
    Rule(
        "warning",
        "no-preference-metric",
        "evaluation.metrics",
        find_no_preference_metric,
        lambda facts: f"add {name_preference_metrics(facts)} to evaluation.metrics",
    ),
    Rule(
        "error",
        "reward-model",
        "model.name",
        find_reward_model,
        "set training.method: reward, or name the language model that it was made from",
    ),
    Rule("error", "leaking-pack", "training.packing", find_leaking_pack, "set training.packing: false"),
    Rule(
        "error",
        "raw-text",
        "data.strategy",
        find_raw_text,
        "set data.strategy: standard, or write the rows as messages with a user and an assistant turn",
    ),
    Rule(
        "error",
        "foreign-tokenizer",
        "model.name",
        find_foreign_tokenizer,
        "put the tokenizer files that belong to this model beside its weights",
    ),
    Rule(
        "error",
        "beyond-positions",
        "data.max_length",
        lambda facts: find_beyond_positions(facts) if facts.learned_positions else None,
        lambda facts: f"set data.max_length to {facts.positions} or less: this model has no further position",
    ),
    Rule(
        "error",
        "answer-beyond-positions",
        "generation.max_new_tokens",
        lambda facts: find_answer_beyond_positions(facts) if facts.learned_positions else None,
        "lower generation.max_new_tokens, or shorten the prompts",
    ),
    Rule(
        "warning",
        "beyond-positions",
        "data.max_length",
        lambda facts: None if facts.learned_positions else find_beyond_positions(facts),
        lambda facts: f"set data.max_length to {facts.positions} or less: the model has never seen later positions",
    ),
    Rule(
        "warning",
        "answer-beyond-positions",
        "generation.max_new_tokens",
        lambda facts: None if facts.learned_positions else find_answer_beyond_positions(facts),
        "lower generation.max_new_tokens, or shorten the prompts",
    ),
    Rule(
        "warning",
        "far-learning-rate",
        "training.learning_rate",
        find_far_learning_rate,
        lambda facts: f"start from {find_usual_rate(facts):g}, and try a third and three times of it",
    ),
    Rule("warning", "far-alpha", "lora.alpha", find_far_alpha, "set lora.alpha to about twice lora.r"),
    Rule(
        "warning",
        "long-step",
        "training.batch_size",
        find_long_step,
        "lower training.batch_size, take a smaller model, or use a GPU",
    ),
    Rule(
        "warning",
        "few-steps",
        "training.epochs",
        find_few_steps,
        "lower training.batch_size, or raise training.epochs: 100 steps and more are usual; remove both lines, and "
        "training.small_data chooses for a small set",
    ),
    Rule("warning", "few-held-out", "data.eval_fraction", find_few_held_out, "hold out at least 5 rows"),
    Rule(
        "warning",
        "idle-samples",
        "evaluation.samples",
        find_idle_samples,
        f"add {' or '.join(ON_ANSWERS)} to evaluation.metrics, or remove samples",
    ),
    Rule(
        "warning", "idle-project", "tracking.project", find_idle_project, "set tracking.wandb: true, or remove project"
    ),
    Rule("warning", "text-loss-on", "data.loss_on", find_text_loss_on, "remove loss_on, or write the rows as messages"),
    Rule(
        "warning",
        "text-template",
        "data.template",
        lambda facts: find_unlearned_words(facts, "template"),
        "remove template, or write the rows as messages",
    ),
    Rule(
        "warning",
        "text-system",
        "data.system",
        lambda facts: find_unlearned_words(facts, "system"),
        "remove system, or write the rows as messages",
    ),
    Rule("warning", "no-eval", "data.eval_fraction", find_no_held_out, "set data.eval or data.eval_fraction"),
)
