"""One table of the model families that recipes are pinned for, and one of the learning rates that they start from.

A family that is not in the table still trains: `all-linear` finds its modules, and its own files say whether it has a chat
template. The table exists so that a wrong target or strategy is refused before anything heavy is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelFamily:
    """What is known of a family without loading it.

    Attributes:
        name: the family, as recipes are named after it.
        model_types: values of `model_type` in `config.json` that belong to it.
        lora_targets: the linear modules of one layer, by their last name.
        name_parts: the family's hub ids contain one of these, and no other family's do: what the rules refuse by.
        has_chat_template: False where no release of the family ships one.
        name_hints: hub ids that contain one of these most likely belong to it: what `new_recipe.py` chooses by where it
            cannot see the model's files. A pre-flight with the files has the last word.
    """

    name: str
    model_types: tuple[str, ...]
    lora_targets: tuple[str, ...]
    name_parts: tuple[str, ...] = ()
    has_chat_template: bool = True
    name_hints: tuple[str, ...] = ()


SPLIT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily("gpt2", ("gpt2",), ("c_attn", "c_proj", "c_fc"), ("gpt2",), has_chat_template=False),
    ModelFamily(
        "gpt_neo",
        ("gpt_neo",),
        ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"),
        ("gpt-neo",),
        has_chat_template=False,
    ),
    ModelFamily(
        "gptj",
        ("gptj",),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        ("gpt-j",),
        has_chat_template=False,
    ),
    ModelFamily("llama", ("llama",), SPLIT_PROJECTIONS, name_hints=("llama-", "llama2", "llama3", "smollm")),
    ModelFamily("mistral", ("mistral",), SPLIT_PROJECTIONS, name_hints=("mistral-7b", "mistral-nemo", "ministral-8b")),
    ModelFamily("qwen", ("qwen2", "qwen3"), SPLIT_PROJECTIONS, name_hints=("qwen2", "qwen3-")),
    ModelFamily(
        "gemma",
        ("gemma", "gemma2", "gemma3_text"),
        SPLIT_PROJECTIONS,
        name_hints=("gemma-2b", "gemma-7b", "gemma-1.1-", "gemma-2-", "gemma-3-270m", "gemma-3-1b"),
    ),
    ModelFamily(
        "phi",
        ("phi",),
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        ("phi-1", "phi-2"),
        has_chat_template=False,
    ),
    ModelFamily(
        "phi3",
        ("phi3",),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        name_hints=("phi-3-m", "phi-3.5-mini", "phi-4"),
    ),
)
# Architectures that build attention from positions that restart, so that the examples of a packed row are blind to each other
# (tests/backends/test_families.py). OPT, Falcon, Bloom, MPT and gpt-oss take the row for one text.
PACKING_MODELS = frozenset(
    {
        *(model_type for family in FAMILIES for model_type in family.model_types),
        *("cohere", "cohere2", "glm4", "gpt_bigcode", "gpt_neox", "granite", "mixtral", "olmo", "olmo2", "qwen2_moe"),
        *("qwen3_moe", "smollm3", "stablelm", "starcoder2"),
    }
)
# Releases under a family's name that have other modules: pictures or sound beside text, or several experts in a layer.
OTHER_ARCHITECTURES = re.compile(
    r"vision|multimodal|omni|audio|moe|llama-4|[-_]vl|\d+x\d+b|-a\d+(\.\d+)?b|flash|paligemma|recurrent|t5gemma"
)
# Parameters of releases whose name does not give them; the longest name that fits counts.
KNOWN_SIZES: dict[str, float] = {
    "gpt2": 124e6,
    "gpt2-medium": 355e6,
    "gpt2-large": 774e6,
    "gpt2-xl": 1.56e9,
    "phi-1": 1.4e9,
    "phi-2": 2.8e9,
    "phi-3-mini": 3.8e9,
    "phi-3.5-mini": 3.8e9,
    "phi-3-medium": 14e9,
    "phi-4-mini": 3.8e9,
    "phi-4": 14.7e9,
    "mistral-nemo": 12.2e9,
}
SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates of AdamW for models up to a size: where a recipe starts from before it is measured.

    Attributes:
        max_parameters: the row holds up to here.
        lora: supervised, with adapters.
        full: supervised, all weights.
        lora_preference: from preferences (DPO), with adapters.
        full_preference: from preferences, all weights.
        lora_of_family: families whose adapters take another rate.
    """

    max_parameters: float
    lora: float
    full: float
    lora_preference: float
    full_preference: float
    lora_of_family: Mapping[str, float] = field(default_factory=dict)


# docs/design.md, section 7, which gives the sources. The bounds lie in the gaps between the sizes that models have.
LEARNING_RATES: tuple[LearningRates, ...] = (
    LearningRates(1.25e9, 4e-4, 3e-5, 1.5e-5, 1e-6, {"qwen": 5e-4}),
    LearningRates(5e9, 3e-4, 2e-5, 1e-5, 7e-7, {"llama": 3.5e-4, "qwen": 4.5e-4}),
    LearningRates(15e9, 2e-4, 1e-5, 5e-6, 5e-7, {"llama": 2.8e-4}),
    LearningRates(float("inf"), 1.3e-4, 5e-6, 3e-6, 2e-7),
)
# ORPO's loss is the supervised one with a preference term beside it (arXiv 2403.07691, section 4), so its rates are too.
SUPERVISED_METHODS, PREFERENCE_METHODS = ("sft", "orpo"), ("dpo", "kto")
# Reward models: a quarter of the supervised rates, which are then those of TRL's examples for 0.5B (1e-4 with adapters).
REWARD_SHARE = 0.25


def find_family(model_type: str | None) -> ModelFamily | None:
    """The family of a `model_type`, or None for one that the table does not know."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def find_family_by_name(name: str) -> ModelFamily | None:
    """The family that a hub id names without doubt; used only to refuse early, never to choose."""
    last = name.rsplit("/", 1)[-1].lower()
    return next((family for family in FAMILIES if any(part in last for part in family.name_parts)), None)


def guess_family(name: str) -> ModelFamily | None:
    """The family that a hub id most likely belongs to; for a recipe that is written before its model can be looked at."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    if OTHER_ARCHITECTURES.search(last):
        return None
    hinted = (family for family in FAMILIES if any(hint in last for hint in family.name_hints))
    return find_family_by_name(last) or next(hinted, None)


def guess_parameters(name: str) -> int | None:
    """The number of parameters that a model's name gives: `Llama-3.2-1B-Instruct`, `SmolLM2-135M`, `8B`."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    if found := SIZE_IN_NAME.search(last):
        return round(float(found[1]) * (1e9 if found[2] == "b" else 1e6))
    known = max((short for short in KNOWN_SIZES if short in last), key=len, default=None)
    return round(KNOWN_SIZES[known]) if known and not OTHER_ARCHITECTURES.search(last) else None


def find_learning_rate(parameters: float, family: ModelFamily | None, method: str, *, with_lora: bool) -> float | None:
    """The table's peak learning rate.

    Args:
        parameters: of the model.
        family: its row in the family table, if it has one.
        method: as in `training.method`.
        with_lora: adapters, rather than all weights.

    Returns:
        None for a method that the table does not know.
    """
    row = next(row for row in LEARNING_RATES if parameters <= row.max_parameters)
    if method in PREFERENCE_METHODS:
        return row.lora_preference if with_lora else row.full_preference
    if method == "reward":
        return REWARD_SHARE * (row.lora if with_lora else row.full)
    if method not in SUPERVISED_METHODS:
        return None
    if not with_lora:
        return row.full
    return row.lora_of_family.get(family.name, row.lora) if family else row.lora
