"""One table of the model families that recipes are pinned for: what to adapt, and whether they can chat.

A family that is not in the table still trains: `all-linear` finds its modules, and its own files say whether it has a chat
template. The table exists so that a wrong target or strategy is refused before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFamily:
    """What is known of a family without loading it.

    Attributes:
        name: the family, as recipes are named after it.
        model_types: values of `model_type` in `config.json` that belong to it.
        lora_targets: the linear modules of one layer, by their last name.
        name_parts: the family's hub ids contain one of these.
        has_chat_template: False where no release of the family ships one.
    """

    name: str
    model_types: tuple[str, ...]
    lora_targets: tuple[str, ...]
    name_parts: tuple[str, ...] = ()
    has_chat_template: bool = True


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
    ModelFamily("llama", ("llama",), SPLIT_PROJECTIONS),
    ModelFamily("mistral", ("mistral",), SPLIT_PROJECTIONS),
    ModelFamily("qwen", ("qwen2", "qwen3"), SPLIT_PROJECTIONS),
    ModelFamily("gemma", ("gemma", "gemma2", "gemma3_text"), SPLIT_PROJECTIONS),
    ModelFamily(
        "phi",
        ("phi",),
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        ("phi-1", "phi-2"),
        has_chat_template=False,
    ),
    ModelFamily("phi3", ("phi3",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
)


def find_family(model_type: str | None) -> ModelFamily | None:
    """The family of a `model_type`, or None for one that the table does not know."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def find_family_by_name(name: str) -> ModelFamily | None:
    """The family that a hub id names without doubt; used only to refuse early, never to choose."""
    last = name.rsplit("/", 1)[-1].lower()
    return next((family for family in FAMILIES if any(part in last for part in family.name_parts)), None)
