"""The table of rules: each rule with a recipe that breaks it, and the shipped recipes that break none."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from config.model_families import FAMILIES, find_family
from config.recipe_io import iterate_schema_keys, load_recipe
from config.recipe_rules import PAIR_METRICS
from config.structured_config import Recipe
from utils.exceptions import RecipeError
from utils.model_source import ModelSource
from utils.preflight import check_recipe
from utils.range_table import RANGES
from utils.rule_table import RULES
from utils.rules import Facts, find_problems

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def make_recipe(**sections: Any) -> Recipe:
    """A plain recipe with some sections changed; lora=None leaves the section out."""
    values: dict[str, Any] = {
        "model": {"name": "x"},
        "data": {"train": "x.jsonl"},
        "lora": {},
        "training": {"method": "sft"},
        "generation": {},
        "evaluation": {},
        "tracking": {},
    }
    for name, changes in sections.items():
        values[name] = None if changes is None else {**values[name], **changes}
    return Recipe.model_validate(values)


def list_codes(facts: Facts) -> list[tuple[str, str, str | None]]:
    return [(problem.severity, problem.code, problem.where) for problem in find_problems(facts, lambda key: key)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_breaks_no_rule(path: Path) -> None:
    loaded = load_recipe(path)
    assert find_problems(Facts(loaded.recipe), loaded.find_origin) == []


@pytest.mark.parametrize("parameters", [135e6, 0.5e9, 1.2e9, 3.8e9, 8e9, 70e9])
def test_the_defaults_break_no_rule_at_any_size(parameters: float) -> None:
    facts = Facts(
        make_recipe(),
        parameters=int(parameters),
        positions=4096,
        formats={"messages": 900},
        held_out_rows=100,
        longest_prompt=300,
        steps=170,
        device="cuda",
    )
    assert find_problems(facts, str) == []


DPO: dict[str, Any] = {
    "training": {"method": "dpo"},
    "evaluation": {"metrics": ("preference_accuracy",)},
}

KTO: dict[str, Any] = {"training": {"method": "kto"}, "evaluation": {"metrics": ("label_accuracy",)}}
GPT2 = find_family("gpt2")
BROKEN: list[tuple[str, str, str, Facts]] = [
    (
        "error",
        "no-chat-template",
        "data.strategy",
        Facts(make_recipe(data={"strategy": "chat"}), family=GPT2, has_chat_template=False),
    ),
    (
        "error",
        "leaking-pack",
        "training.packing",
        Facts(make_recipe(training={"packing": True}), model_type="opt"),
    ),
    (
        "error",
        "no-chat-template",
        "data.strategy",
        Facts(make_recipe(data={"strategy": "chat"}), has_chat_template=False),
    ),
    (
        "error",
        "lora-target",
        "lora.target_modules",
        Facts(make_recipe(lora={"target_modules": ["c_attn", "q_proj"]}), family=GPT2),
    ),
    (
        "error",
        "lora-target",
        "lora.target_modules",
        Facts(make_recipe(lora={"target_modules": ["c_attn"]}), modules=("q_proj",)),
    ),
    (
        "error",
        "unknown-module",
        "lora.modules_to_save",
        Facts(make_recipe(lora={"modules_to_save": ["lm_head", "wte"]}), whole_modules=("embed_tokens", "lm_head")),
    ),
    (
        "error",
        "preference-rows",
        "data.train",
        Facts(make_recipe(), formats={"preference": 3, "messages": 5}),
    ),
    ("error", "preference-rows", "data.train", Facts(make_recipe(data={"format": "preference"}))),
    (
        "error",
        "no-pairs",
        "data.train",
        Facts(make_recipe(**DPO), formats={"preference": 3, "messages": 5}),
    ),
    ("warning", "no-preference-metric", "evaluation.metrics", Facts(make_recipe(training={"method": "orpo"}))),
    ("error", "reward-model", "model.name", Facts(make_recipe(), is_reward=True)),
    ("error", "no-pairs", "data.train", Facts(make_recipe(**KTO), formats={"labelled": 3, "messages": 5})),
    ("error", "labelled-rows", "data.train", Facts(make_recipe(), formats={"labelled": 3, "messages": 5})),
    ("error", "labelled-rows", "data.train", Facts(make_recipe(**DPO), formats={"labelled": 3, "preference": 5})),
    ("error", "labelled-rows", "data.train", Facts(make_recipe(data={"format": "labelled"}))),
    (
        "error",
        "two-answer-metric",
        "evaluation.metrics",
        Facts(
            make_recipe(training={"method": "kto"}, evaluation={"metrics": ("reward_accuracy",)}),
            held_out_answers=(4, 5),
            held_out_rows=6,
        ),
    ),
    (
        "error",
        "no-desirable-answer",
        "evaluation.metrics",
        Facts(
            make_recipe(training={"method": "kto"}, evaluation={"metrics": ("label_accuracy", "loss")}),
            held_out_answers=(0, 6),
            held_out_rows=6,
        ),
    ),
    ("warning", "one-label", "data.train", Facts(make_recipe(**KTO), answers=(9, 0))),
    ("warning", "label-balance", "kto.desirable_weight", Facts(make_recipe(**KTO), answers=(10, 20))),
    ("warning", "label-balance", "kto.desirable_weight", Facts(make_recipe(**KTO), answers=(20, 14))),
    ("error", "raw-text", "data.strategy", Facts(make_recipe(data={"strategy": "chat"}), formats={"text": 1})),
    (
        "error",
        "beyond-positions",
        "data.max_length",
        Facts(make_recipe(data={"max_length": 1025}), positions=1024, learned_positions=True),
    ),
    ("error", "foreign-tokenizer", "model.name", Facts(make_recipe(), vocabulary=32_064, largest_id=32_064)),
    (
        "error",
        "foreign-tokenizer",
        "model.name",
        Facts(make_recipe(data={"added_tokens": ["<a>", "<b>"]}), vocabulary=100, largest_id=102),
    ),
    ("warning", "beyond-positions", "data.max_length", Facts(make_recipe(), positions=1023)),
    (
        "error",
        "answer-beyond-positions",
        "generation.max_new_tokens",
        Facts(make_recipe(), positions=1024, learned_positions=True, longest_prompt=769),
    ),
    (
        "warning",
        "answer-beyond-positions",
        "generation.max_new_tokens",
        Facts(make_recipe(), positions=1024, longest_prompt=769),
    ),
    (
        "warning",
        "far-learning-rate",
        "training.learning_rate",
        Facts(make_recipe(training={"learning_rate": 2.1e-3}), parameters=10**8),
    ),
    ("warning", "far-learning-rate", "training.learning_rate", Facts(make_recipe(lora=None), parameters=10**8)),
    (
        "warning",
        "far-learning-rate",
        "training.learning_rate",
        Facts(make_recipe(training={"learning_rate": 2e-5}), parameters=10**8),
    ),
    ("warning", "far-alpha", "lora.alpha", Facts(make_recipe(lora={"alpha": 15.0}))),
    ("warning", "far-alpha", "lora.alpha", Facts(make_recipe(lora={"alpha": 65.0}))),
    (
        "warning",
        "long-step",
        "training.batch_size",
        Facts(make_recipe(), parameters=8 * 10**9, tokens_per_step=4000.0, device="cpu", cores=8),
    ),
    (
        "error",
        "adamw-8bit",
        "training.optimizer",
        Facts(make_recipe(training={"optimizer": "adamw_8bit"}), device="cpu"),
    ),
    ("warning", "few-steps", "training.epochs", Facts(make_recipe(), steps=19)),
    ("warning", "few-held-out", "data.eval_fraction", Facts(make_recipe(), held_out_rows=4)),
    ("warning", "no-eval", "data.eval_fraction", Facts(make_recipe(), held_out_rows=0)),
    ("warning", "no-eval", "data.eval_fraction", Facts(make_recipe(data={"eval_fraction": 0.0}))),
    ("warning", "idle-samples", "evaluation.samples", Facts(make_recipe(evaluation={"samples": 6}))),
    ("warning", "idle-project", "tracking.project", Facts(make_recipe(tracking={"project": "mine"}))),
    ("warning", "text-loss-on", "data.loss_on", Facts(make_recipe(data={"loss_on": "last"}), formats={"text": 2})),
    ("warning", "text-template", "data.template", Facts(make_recipe(data={"template": "raw"}), formats={"text": 2})),
    ("warning", "text-system", "data.system", Facts(make_recipe(data={"system": "Hi."}), formats={"text": 2})),
    ("warning", "unusual-value", "training.epochs", Facts(make_recipe(training={"epochs": 0.5}))),
    ("warning", "unusual-value", "training.epochs", Facts(make_recipe(training={"epochs": 11.0}))),
    ("warning", "unusual-value", "training.batch_size", Facts(make_recipe(training={"batch_size": 3}))),
    ("warning", "unusual-value", "training.batch_size", Facts(make_recipe(training={"batch_size": 129}))),
    ("warning", "unusual-value", "training.warmup_ratio", Facts(make_recipe(training={"warmup_ratio": 0.21}))),
    ("warning", "unusual-value", "training.weight_decay", Facts(make_recipe(training={"weight_decay": 0.2}))),
    ("warning", "unusual-value", "training.neftune_alpha", Facts(make_recipe(training={"neftune_alpha": 4.0}))),
    ("warning", "unusual-value", "lora.r", Facts(make_recipe(lora={"r": 4, "alpha": 8.0}))),
    ("warning", "unusual-value", "lora.r", Facts(make_recipe(lora={"r": 128, "alpha": 256.0}))),
    ("warning", "unusual-value", "lora.plus_ratio", Facts(make_recipe(lora={"plus_ratio": 64.0}))),
    ("warning", "unusual-value", "lora.dropout", Facts(make_recipe(lora={"dropout": 0.3}))),
]


@pytest.mark.parametrize(
    ("severity", "code", "key", "facts"), BROKEN, ids=[f"{index}-{row[1]}" for index, row in enumerate(BROKEN)]
)
def test_a_broken_rule_is_the_only_problem_and_names_its_key(severity: str, code: str, key: str, facts: Facts) -> None:
    assert list_codes(facts) == [(severity, code, key)]
    (problem,) = find_problems(facts, lambda key: f"recipe.yaml:{len(key)}")
    assert problem.where == f"recipe.yaml:{len(key)}"
    assert problem.fix


def test_every_rule_and_range_is_broken_by_a_test() -> None:
    broken = {row[:3] for row in BROKEN}
    assert {(rule.severity, rule.code, rule.key) for rule in RULES} <= broken
    assert {("warning", "unusual-value", usual.key) for usual in RANGES} <= broken


@pytest.mark.parametrize("answers", [(10, 20), (20, 10), (99, 100), (3, 1), (7, 500)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.5, 0.4)])
def test_each_proposed_weight_of_a_label_brings_the_balance_into_its_range(
    answers: tuple[int, int], weights: tuple[float, float]
) -> None:
    kto = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    facts = Facts(
        Recipe.model_validate({**make_recipe(**KTO).model_dump(exclude_unset=True), "kto": kto}), answers=answers
    )
    for problem in find_problems(facts, str):
        assert problem.message.startswith(f"{answers[0]} desirable answers weigh ")
        assert f"as much as {answers[1]} undesirable" in problem.message
        for proposal in (problem.fix or "").removeprefix("set ").split(", or "):
            key, _, value = proposal.removeprefix("kto.").partition(": ")
            changed = {**kto, key: float(value)}
            balance = changed["desirable_weight"] * answers[0] / (changed["undesirable_weight"] * answers[1])
            assert 1.0 <= balance <= 4 / 3
    balance = weights[0] * answers[0] / (weights[1] * answers[1])
    assert bool(find_problems(facts, str)) == (not 0.99 <= balance <= 1.34)


def test_pairs_have_a_balance_too_and_equal_weights_are_right() -> None:
    assert find_problems(Facts(make_recipe(**KTO), answers=(50, 50)), str) == []


def test_the_first_row_without_a_label_is_named() -> None:
    facts = Facts(
        make_recipe(**KTO), formats={"labelled": 9, "prompt_completion": 2}, first_rows={"prompt_completion": "x:4"}
    )
    (problem,) = find_problems(facts, str)
    assert "2 rows have one answer, the first in x:4" in problem.message
    assert '"label": true' in (problem.fix or "")


def test_bad_answers_are_never_learned_like_good_ones_and_the_error_says_what_to_do() -> None:
    (problem,) = find_problems(Facts(make_recipe(), formats={"labelled": 3}), str)
    assert "method sft would learn bad answers like good ones" in problem.message
    assert "label true" in (problem.fix or "")
    assert "training.method: kto" in (problem.fix or "")


def test_rules_point_at_keys_of_the_schema_and_have_names_of_their_own() -> None:
    assert {rule.key for rule in RULES} | {usual.key for usual in RANGES} <= set(iterate_schema_keys(Recipe))
    assert max(Counter((rule.severity, rule.code) for rule in RULES).values()) == 1


def test_all_problems_are_found_at_once_and_errors_come_first() -> None:
    recipe = make_recipe(
        data={"strategy": "chat", "max_length": 4000},
        lora={"target_modules": ["q_proj"], "alpha": 500.0},
        training={"batch_size": 500},
    )
    facts = Facts(
        recipe,
        family=GPT2,
        has_chat_template=False,
        positions=1024,
        learned_positions=True,
        formats={"text": 7, "preference": 1},
    )
    severities = [severity for severity, _, _ in list_codes(facts)]
    assert severities == ["error"] * 5 + ["warning"] * 2


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_targets_of_a_family_fit_it_and_wrong_ones_are_answered_with_the_right_ones(family: Any) -> None:
    right = make_recipe(lora={"target_modules": list(family.lora_targets)})
    assert list_codes(Facts(right, family=family)) == []
    wrong = make_recipe(lora={"target_modules": ["wrong_proj"]})
    (problem,) = find_problems(Facts(wrong, family=family), str)
    assert all(name in (problem.fix or "") for name in family.lora_targets)


def test_a_model_that_brings_a_template_may_chat_whatever_its_family() -> None:
    recipe = make_recipe(data={"strategy": "chat"})
    assert list_codes(Facts(recipe, family=GPT2, has_chat_template=True)) == []
    named = make_recipe(data={"strategy": "chat", "template": "chatml"})
    assert list_codes(Facts(named, family=GPT2, has_chat_template=False)) == []
    standard = make_recipe(data={"strategy": "standard"})
    assert list_codes(Facts(standard, family=GPT2, has_chat_template=False)) == []


def test_the_metric_that_is_advised_for_pairs_is_one_that_the_method_allows() -> None:
    # ORPO was told to add reward_accuracy, which its own rules refuse.
    for method in ("dpo", "kto", "orpo"):
        (problem,) = find_problems(Facts(make_recipe(training={"method": method})), str)
        advised = [name for name in PAIR_METRICS if re.search(rf"\b{name}\b", problem.fix or "")]
        assert advised
        better = make_recipe(training={"method": method}, evaluation={"metrics": tuple(advised)})
        assert list_codes(Facts(better)) == []


def test_keys_that_act_on_what_is_there_are_not_idle() -> None:
    answering = {"samples": 6, "metrics": ("exact_match",)}
    assert list_codes(Facts(make_recipe(evaluation=answering))) == []
    assert list_codes(Facts(make_recipe(tracking={"project": "mine", "wandb": True}))) == []
    mixed = {"text": 2, "messages": 1}
    data = {"loss_on": "last", "template": "chatml", "system": "Hi."}
    assert list_codes(Facts(make_recipe(data=data), formats=mixed)) == []


def test_metrics_that_are_asked_for_without_held_out_rows_are_named() -> None:
    recipe = make_recipe(data={"eval_fraction": 0.0}, evaluation={"metrics": ("loss",)})
    (problem,) = find_problems(Facts(recipe), str)
    assert (
        problem.message == "no held-out rows, so nothing will show whether it got better, by evaluation.metrics either"
    )


def test_full_fine_tuning_has_its_own_learning_rate() -> None:
    recipe = make_recipe(lora=None, training={"learning_rate": 3e-5})
    assert list_codes(Facts(recipe, parameters=10**8)) == []
    (problem,) = find_problems(Facts(make_recipe(lora=None), parameters=8 * 10**9), str)
    assert (
        problem.message == "learning_rate 0.0004 is 40 times above the usual 1e-05 for all weights on 8.0B parameters"
    )


def test_max_steps_make_epochs_meaningless() -> None:
    assert list_codes(Facts(make_recipe(training={"max_steps": 300}))) == []


def test_a_tokenizer_that_gives_more_ids_than_the_model_has_embeddings_is_refused(
    embedded: ModelSource, tmp_path: Path
) -> None:
    # Seen with a Phi-3 model of 32,064 rows and a tokenizer of 49,152 tokens: an IndexError from inside the first forward pass.
    folder = tmp_path / "model"
    shutil.copytree(embedded.folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}), encoding="utf-8")
    loaded = load_recipe(ROOT / "recipes" / "smollm2_sql.yaml", [f"model.name={folder}"])
    with pytest.raises(RecipeError, match="embeddings for 1000 tokens") as caught:
        check_recipe(loaded)
    assert caught.value.problems[0].code == "foreign-tokenizer"


def test_8_bit_moments_are_allowed_on_cuda_and_refused_elsewhere() -> None:
    recipe = make_recipe(training={"optimizer": "adamw_8bit"})
    assert list_codes(Facts(recipe, device="cuda")) == list_codes(Facts(recipe)) == []
    (problem,) = find_problems(Facts(recipe, device="mps"), str)
    assert problem.message == "optimizer adamw_8bit needs an NVIDIA GPU, and this run would be on mps"
    assert "adafactor" in (problem.fix or "")


def test_early_stopping_without_held_out_rows_is_said_to_do_nothing() -> None:
    facts = Facts(make_recipe(training={"early_stopping_patience": 3}), held_out_rows=0)
    assert [problem.message for problem in find_problems(facts, str)] == [
        "no held-out rows, so nothing will show whether it got better, and early stopping cannot act"
    ]
