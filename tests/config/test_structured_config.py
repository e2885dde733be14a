"""The schema: bounds, rules between keys, frozen values, descriptions, and what it hands to peft and transformers."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType
from pydantic import ValidationError
from transformers import BitsAndBytesConfig, GenerationConfig

from config.foreign_names import FOREIGN_NAMES
from config.recipe_errors import iterate_schema_keys
from config.recipe_rules import RecipeRuleError, RuleViolation
from config.structured_config import (
    DataSection,
    DpoSection,
    EvaluationSection,
    GenerationSection,
    KtoSection,
    LoraSection,
    ModelSection,
    OrpoSection,
    Recipe,
    ScratchSection,
    Section,
    TrackingSection,
    TrainingSection,
)

SECTIONS = (
    Recipe,
    ModelSection,
    DataSection,
    ScratchSection,
    LoraSection,
    TrainingSection,
    DpoSection,
    KtoSection,
    OrpoSection,
    GenerationSection,
    EvaluationSection,
    TrackingSection,
)
FIELDS = [(section, name) for section in SECTIONS for name in section.model_fields]
DOTTED = re.compile(r"\b[a-z]+\.[a-z_]+\b")
PROMISED = re.compile(r"\b([a-z]+)\.([a-z_]+): (\w+)(?: or (\w+))?")


def make_values(**sections: Any) -> dict[str, Any]:
    """A valid recipe with some keys changed, as `training={"epochs": 1}`."""
    values: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "x.jsonl"}, "training": {"method": "sft"}}
    for name, given in sections.items():
        values[name] = {**values.get(name, {}), **given} if isinstance(given, dict) else given
    return values


def find_violations(**sections: Any) -> list[RuleViolation]:
    """The cross-field rules that a recipe breaks; none if it is valid."""
    try:
        Recipe(**make_values(**sections))
    except ValidationError as error:
        causes = [detail.get("ctx", {}).get("error") for detail in error.errors()]
        if all(isinstance(cause, RecipeRuleError) for cause in causes):
            return [violation for cause in causes for violation in cause.violations]
        raise
    return []


RULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("model.quantization", {"model": {"quantization": "nf4"}}, {"model": {"quantization": "nf4"}, "lora": {"r": 8}}),
    ("model.dtype", {"model": {"dtype": "bfloat16"}}, {"model": {"dtype": "bfloat16"}, "lora": {}}),
    ("model.dtype", {"model": {"dtype": "float16"}}, {"model": {"dtype": "float32"}}),
    ("model.quantization", {"model": {"quantization": "int8"}}, {"model": {"quantization": "int8"}, "lora": {}}),
    (
        "training.neftune_alpha",
        {"training": {"packing": True, "neftune_alpha": 5.0}},
        {"training": {"packing": False, "neftune_alpha": 5.0}},
    ),
    (
        "training.micro_batch_size",
        {"training": {"packing": True, "micro_batch_size": 4}},
        {"training": {"packing": True, "micro_batch_size": "auto"}},
    ),
    (
        "training.eval_every",
        {"data": {"eval_fraction": 0.0}, "training": {"eval_every": 5}},
        {"data": {"eval_fraction": 0.0}, "training": {"eval_every": "epoch"}},
    ),
    ("training.max_steps", {"training": {"max_steps": 9, "epochs": 3.0}}, {"training": {"max_steps": 9}}),
    (
        "training.micro_batch_size",
        {"training": {"micro_batch_size": 9, "batch_size": 8}},
        {"training": {"micro_batch_size": 8, "batch_size": 8}},
    ),
    (
        "training.eval_every",
        {"training": {"max_steps": 9, "eval_every": 10}},
        {"training": {"max_steps": 10, "eval_every": 10}},
    ),
    (
        "training.save_every",
        {"training": {"max_steps": 9, "save_every": 10}},
        {"training": {"max_steps": 10, "save_every": 10}},
    ),
    (
        "training.early_stopping_patience",
        {"data": {"eval_fraction": 0.0}, "training": {"early_stopping_patience": 2}},
        {"data": {"eval": "e.jsonl"}, "training": {"early_stopping_patience": 2}},
    ),
    (
        "training.early_stopping_threshold",
        {"training": {"early_stopping_threshold": 0.1}},
        {"training": {"early_stopping_threshold": 0.1, "early_stopping_patience": 2}},
    ),
    ("data.eval_fraction", {"data": {"eval": "e.jsonl", "eval_fraction": 0.2}}, {"data": {"eval_fraction": 0.2}}),
    (
        "data.strategy",
        {"data": {"strategy": "chat", "format": "text"}},
        {"data": {"strategy": "standard", "format": "text"}},
    ),
    ("dpo", {"dpo": {"beta": 0.2}}, {"training": {"method": "dpo"}, "dpo": {"beta": 0.2}}),
    ("kto", {"training": {"method": "dpo"}, "kto": {}}, {"training": {"method": "kto"}, "kto": {}}),
    ("orpo", {"training": {"method": "kto"}, "orpo": {}}, {"training": {"method": "orpo"}, "orpo": {}}),
    (
        "dpo.label_smoothing",
        {"training": {"method": "dpo"}, "dpo": {"label_smoothing": 0.1, "loss": "ipo"}},
        {"training": {"method": "dpo"}, "dpo": {"label_smoothing": 0.1}},
    ),
    (
        "dpo.reference",
        {"training": {"method": "dpo"}, "dpo": {"reference": "adapter_off"}},
        {"training": {"method": "dpo"}, "dpo": {"reference": "adapter_off"}, "lora": {}},
    ),
    (
        "training.packing",
        {"training": {"method": "dpo", "packing": True}},
        {"training": {"method": "dpo", "packing": False}},
    ),
    (
        "training.neftune_alpha",
        {"training": {"method": "orpo", "neftune_alpha": 5.0}},
        {"training": {"method": "orpo"}},
    ),
    (
        "data.loss_on",
        {"training": {"method": "dpo"}, "data": {"loss_on": "all"}},
        {"training": {"method": "dpo"}, "data": {"loss_on": "last"}},
    ),
    (
        "data.format",
        {"training": {"method": "dpo"}, "data": {"format": "messages"}},
        {"training": {"method": "dpo"}, "data": {"format": "preference"}},
    ),
    (
        "data.format",
        {"training": {"method": "dpo"}, "data": {"format": "labelled"}},
        {"training": {"method": "kto"}, "data": {"format": "labelled"}},
    ),
    (
        "evaluation.metrics",
        {"evaluation": {"metrics": ["label_accuracy"]}},
        {"training": {"method": "kto"}, "evaluation": {"metrics": ["label_accuracy"]}},
    ),
    (
        "evaluation.metrics",
        {"training": {"method": "orpo"}, "evaluation": {"metrics": ["label_accuracy"]}},
        {"training": {"method": "dpo"}, "evaluation": {"metrics": ["label_accuracy"]}},
    ),
    (
        "evaluation.metrics",
        {"evaluation": {"metrics": ["preference_accuracy"]}},
        {"training": {"method": "dpo"}, "evaluation": {"metrics": ["preference_accuracy"]}},
    ),
    (
        "evaluation.metrics",
        {"training": {"method": "orpo"}, "evaluation": {"metrics": ["reward_accuracy"]}},
        {"training": {"method": "orpo"}, "evaluation": {"metrics": ["preference_accuracy_per_token"]}},
    ),
    (
        "evaluation.metrics",
        {"training": {"method": "reward"}, "evaluation": {"metrics": ["loss"]}},
        {"training": {"method": "reward"}, "evaluation": {"metrics": ["preference_accuracy"]}},
    ),
    (
        "generation",
        {"training": {"method": "reward"}, "generation": {"temperature": 0.5}},
        {"training": {"method": "reward"}},
    ),
    (
        "data.added_tokens",
        {"training": {"method": "reward"}, "data": {"added_tokens": ["<a>"]}},
        {"training": {"method": "dpo"}, "data": {"added_tokens": ["<a>"]}},
    ),
    (
        "lora.modules_to_save",
        {"training": {"method": "reward"}, "lora": {"modules_to_save": ["lm_head"]}},
        {"training": {"method": "reward"}, "lora": {"modules_to_save": ["norm"]}},
    ),
    ("reward", {"training": {"method": "dpo"}, "reward": {}}, {"training": {"method": "reward"}, "reward": {}}),
    ("generation.top_p", {"generation": {"top_p": 0.9}}, {"generation": {"top_p": 0.9, "temperature": 0.5}}),
    ("generation.top_k", {"generation": {"top_k": 9}}, {"generation": {"top_k": 9, "temperature": 0.5}}),
]


@pytest.mark.parametrize(("key", "broken", "_whole"), RULES, ids=[f"{key}-{i}" for i, (key, *_) in enumerate(RULES)])
def test_keys_that_contradict_each_other_are_refused_with_a_way_out(
    key: str, broken: dict[str, Any], _whole: dict[str, Any]
) -> None:
    violations = find_violations(**broken)
    assert [".".join(violation.path) for violation in violations] == [key]
    assert violations[0].message
    assert violations[0].fix


@pytest.mark.parametrize(("key", "_broken", "whole"), RULES, ids=[f"{key}-{i}" for i, (key, *_) in enumerate(RULES)])
def test_the_same_keys_without_the_contradiction_are_fine(
    key: str, _broken: dict[str, Any], whole: dict[str, Any]
) -> None:
    assert find_violations(**whole) == [], key


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_methods_own_section_stands_in_the_recipe_with_its_defaults_and_no_other_does(method: str) -> None:
    recipe = Recipe(**make_values(training={"method": method}))
    given = {"dpo": recipe.dpo, "kto": recipe.kto, "orpo": recipe.orpo}
    assert [name for name, section in given.items() if section is not None] == [method]
    assert given[method].beta == 0.1
    assert recipe.training.learns_pairs


def test_a_reward_model_is_measured_by_what_it_can_do() -> None:
    assert Recipe(**make_values(training={"method": "reward"})).evaluation.metrics == ("preference_accuracy",)
    sized = Recipe(**make_values(training={"method": "reward"}, evaluation={"batch_size": 4})).evaluation
    assert (sized.metrics, sized.batch_size) == (("preference_accuracy",), 4)


def test_all_broken_rules_are_reported_at_once() -> None:
    violations = find_violations(
        model={"quantization": "nf4"},
        data={"eval": "e.jsonl", "eval_fraction": 0.2, "strategy": "chat", "format": "text"},
        training={"max_steps": 5, "epochs": 1.0, "eval_every": 9, "save_every": 9, "micro_batch_size": 99},
        generation={"top_p": 0.5, "top_k": 5},
    )
    assert {".".join(violation.path) for violation in violations} == {
        "model.quantization",
        "data.eval_fraction",
        "data.strategy",
        "training.max_steps",
        "training.eval_every",
        "training.save_every",
        "training.micro_batch_size",
        "generation.top_p",
        "generation.top_k",
    }


@pytest.mark.parametrize(
    ("section", "field", "inside", "outside"),
    [
        (LoraSection, "r", [1, 1024], [0, -1, 1025]),
        (LoraSection, "alpha", [0.5, 4096.0], [0.0, -1.0, 4097.0]),
        (LoraSection, "dropout", [0.0, 0.99], [-0.01, 1.0]),
        (TrainingSection, "epochs", [0.01, 1000.0], [0.0, -1.0, 1001.0]),
        (TrainingSection, "max_steps", [1], [0, -5]),
        (TrainingSection, "batch_size", [1, 65536], [0, 65537]),
        (TrainingSection, "micro_batch_size", [1, "auto"], [0, "some"]),
        (TrainingSection, "learning_rate", [1e-9, 1.0], [0.0, -1e-4, 1.1]),
        (TrainingSection, "warmup_ratio", [0.0, 0.99], [-0.1, 1.0]),
        (TrainingSection, "weight_decay", [0.0, 1.0], [-0.1, 1.1]),
        (TrainingSection, "max_grad_norm", [0.1, None], [0.0, -1.0]),
        (TrainingSection, "neftune_alpha", [5.0, None], [0.0, 101.0]),
        (TrainingSection, "eval_every", ["epoch", 1], [0, "step"]),
        (TrainingSection, "keep_checkpoints", [1], [0]),
        (TrainingSection, "early_stopping_patience", [1, None], [0]),
        (DataSection, "eval_fraction", [0.0, 0.99], [-0.1, 1.0]),
        (DataSection, "max_length", [8, 1_048_576], [7, 1_048_577]),
        (DataSection, "train", ["a", ["a", "b"], ("a",)], ["", [], [""], None]),
        (GenerationSection, "max_new_tokens", [1], [0]),
        (GenerationSection, "temperature", [0, 0.0, 10.0], [-0.1, 10.1]),
        (GenerationSection, "top_p", [0.1, 1.0, None], [0.0, 1.1]),
        (GenerationSection, "top_k", [1, None], [0]),
        (GenerationSection, "repetition_penalty", [0.5, 10.0], [0.0, 10.1]),
        (EvaluationSection, "metrics", [["loss"], ["exact_match", "perplexity"]], [[], ["bleu"], "loss"]),
        (EvaluationSection, "max_examples", [1, None], [0]),
        (EvaluationSection, "samples", [0, 100], [-1, 101]),
        (Recipe, "seed", [0, 2**32 - 1], [-1, 2**32]),
    ],
)
def test_every_bound_holds_on_both_sides(
    section: type[Section], field: str, inside: list[Any], outside: list[Any]
) -> None:
    base: dict[str, Any] = {"method": "sft"} if section is TrainingSection else {}
    base = {"train": "x"} if section is DataSection else make_values() if section is Recipe else base
    for value in inside:
        section(**{**base, field: value})
    for value in outside:
        with pytest.raises(ValidationError):
            section(**{**base, field: value})


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=[f"{s.__name__}.{n}" for s, n in FIELDS])
def test_every_key_says_what_it_means(section: type[Section], name: str) -> None:
    info = section.model_fields[name]
    is_section = isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    if is_section or name in ("lora", "dpo", "kto", "orpo", "reward", "scratch"):
        assert section is Recipe  # a section says what it is in its own docstring
    else:
        assert info.description, f"{section.__name__}.{name} has no docstring"
        assert len(info.description) >= 15
    assert section.__doc__


def test_every_number_has_a_bound() -> None:
    unbounded = []
    for section, name in FIELDS:
        schema = section.model_json_schema(by_alias=False)["properties"][name]
        unbounded += [
            f"{section.__name__}.{name}"
            for branch in (schema, *schema.get("anyOf", []))
            if branch.get("type") in ("integer", "number") and not {"minimum", "exclusiveMinimum"} & set(branch)
        ]
    assert unbounded == []


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_keys_are_errors_in_every_section(section: type[Section]) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        section(no_such_key=1)


def iterate_sections(recipe: Recipe) -> Iterator[Section]:
    yield recipe
    for value in recipe.__dict__.values():
        if isinstance(value, Section):
            yield value


def test_no_value_can_be_changed_after_reading() -> None:
    recipe = Recipe(**make_values(lora={"target_modules": ["q_proj"]}))
    for section in iterate_sections(recipe):
        for name in type(section).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, None)
    assert recipe.lora is not None
    assert isinstance(recipe.lora.target_modules, tuple)


def test_a_lora_section_becomes_the_same_peft_configuration() -> None:
    section = LoraSection(r=4, alpha=8.0, dropout=0.1, target_modules=("q_proj", "v_proj"))
    config = section.to_peft_config()
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8.0, 0.1)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.task_type == TaskType.CAUSAL_LM
    assert (config.use_rslora, config.use_dora) == (False, False)
    assert config.bias == "none"


def test_all_linear_reaches_peft_as_the_word() -> None:
    assert LoraSection().to_peft_config().target_modules == "all-linear"


@pytest.mark.parametrize(
    ("variant", "rslora", "dora"), [("lora", False, False), ("rslora", True, False), ("dora", False, True)]
)
def test_each_variant_switches_on_exactly_its_own_flag(variant: Any, rslora: bool, dora: bool) -> None:
    config = LoraSection(variant=variant).to_peft_config()
    assert (config.use_rslora, config.use_dora) == (rslora, dora)


def test_a_model_that_is_not_quantised_has_no_quantisation_config() -> None:
    assert ModelSection(name="m").to_quantization_config("bfloat16") is None


def test_int8_becomes_the_eight_bit_configuration() -> None:
    config = ModelSection(name="m", quantization="int8").to_quantization_config("bfloat16")
    assert isinstance(config, BitsAndBytesConfig)
    assert (config.load_in_8bit, config.load_in_4bit) == (True, False)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_four_bits_become_the_named_type_with_double_quantisation(
    quantization: Any, name: str, dtype: torch.dtype
) -> None:
    config = ModelSection(name="m", quantization=quantization).to_quantization_config(name)
    assert isinstance(config, BitsAndBytesConfig)
    assert (config.load_in_8bit, config.load_in_4bit) == (False, True)
    assert config.bnb_4bit_quant_type == quantization
    assert config.bnb_4bit_compute_dtype == dtype
    assert config.bnb_4bit_use_double_quant is True


def test_temperature_zero_becomes_greedy_search_without_sampling_keys() -> None:
    config = GenerationSection(max_new_tokens=7).to_generation_config([1, 2], 0)
    assert isinstance(config, GenerationConfig)
    assert config.do_sample is False
    assert (config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (7, [1, 2], 0)
    assert config.repetition_penalty == 1.0
    config.validate(strict=True)


def test_sampling_takes_exactly_the_recipes_numbers() -> None:
    section = GenerationSection(temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.2)
    config = section.to_generation_config([2], 0)
    assert config.do_sample is True
    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (0.7, 0.9, 40, 1.2)
    config.validate(strict=True)


def test_sampling_without_limits_cuts_nothing_off() -> None:
    # transformers' default of top_k = 50 would cut the distribution although the recipe says null.
    config = GenerationSection(temperature=1.0).to_generation_config([2], 0)
    assert (config.top_p, config.top_k) == (1.0, 0)


@pytest.mark.parametrize("name", sorted(FOREIGN_NAMES))
def test_what_a_foreign_name_points_to_exists(name: str) -> None:
    keys = set(iterate_schema_keys(Recipe))
    text = FOREIGN_NAMES[name].partition("(")[0]
    if text.startswith("here it is "):
        assert DOTTED.findall(text), text
    assert set(DOTTED.findall(text)) <= keys
    for section, key, *values in PROMISED.findall(text):
        for value in filter(None, values):
            lora = {"lora": {}} if section == "model" else {}
            Recipe(**make_values(**{**lora, section: {key: value}}))


def test_no_foreign_name_is_a_top_level_key_or_section_of_ours() -> None:
    assert not set(FOREIGN_NAMES) & set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"quantization": "nf4"}, "lora": {"variant": "pissa"}}, "largest singular values"),
        ({"model": {"quantization": "int8"}, "lora": {"variant": "dora"}}, "lose their scales"),
        ({"model": {"quantization": "nf4", "adapter": "runs/one"}, "lora": {}}, "merge it first|rounded to their few"),
        (
            {"lora": {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["o_proj"]}},
            "o_proj cannot be trained whole",
        ),
        (
            {"training": {"method": "dpo"}, "dpo": {"reference": "adapter_off"}, "lora": {"variant": "pissa"}},
            "no longer the reference",
        ),
        ({"data": {"added_tokens": ["<a>", "<b>", "<a>"]}}, "'<a>' stands there twice"),
        ({"data": {"added_tokens": [" <a>"]}}, "white space"),
    ],
)
def test_adapters_bases_and_tokens_that_cannot_stand_together_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe(**make_values(**change))


def test_pissa_and_whole_modules_reach_peft() -> None:
    config = LoraSection(variant="pissa", modules_to_save=("lm_head",)).to_peft_config()
    assert config.init_lora_weights == "pissa_niter_16"
    assert config.modules_to_save == ["lm_head"]
    assert LoraSection().to_peft_config().init_lora_weights is True
