"""Sizes of a model from its config.json, compared with the models that transformers builds from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from config.model_families import FAMILIES
from utils.model_shape import ANATOMIES, find_positions, has_learned_positions, measure_shape, read_shape
from utils.model_source import ModelSource

MODEL_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]
SIZES: dict[str, Any] = {"vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
OLDER = {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128}


def make_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A small config of an architecture, with a head size that is not the quotient of width and heads where that is allowed."""
    if model_type == "gpt2":
        sizes = dict(OLDER)
    elif model_type == "gptj":
        sizes = {**OLDER, "rotary_dim": 8}
    elif model_type == "gpt_neo":
        kinds = [[["global", "local"], 1], [["global"], 1]]
        sizes = {"hidden_size": 96, "num_layers": 3, "num_heads": 6, "attention_types": kinds, "window_size": 16}
    else:
        sizes = dict(COMMON)
        if model_type not in ("phi", "phi3", "qwen2"):
            sizes["head_dim"] = 20
    return CONFIG_MAPPING[model_type](**{**SIZES, **sizes, **changes})


def build_empty(config: PretrainedConfig) -> torch.nn.Module:
    """The model without memory behind its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"qk_layernorm": True},
    ],
    ids=["as it is", "tied", "not tied", "biased", "normalised heads"],
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_parameters_are_counted_as_transformers_builds_them(model_type: str, changes: dict[str, bool]) -> None:
    config = make_config(model_type, **changes)
    network = build_empty(config)
    shape = read_shape(config.to_dict())
    assert shape is not None
    assert shape.parameters == sum(parameter.numel() for parameter in network.parameters())
    inside = {
        (name.rsplit(".", 1)[-1], module.weight.numel())
        for name, module in network.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    }
    assert {(linear.name, linear.inputs * linear.outputs) for linear in shape.linears} == inside


def test_every_family_of_the_table_has_an_anatomy_with_its_targets() -> None:
    assert set(ANATOMIES) == set(MODEL_TYPES)
    for family in FAMILIES:
        for model_type in family.model_types:
            anatomy = ANATOMIES[model_type]
            assert set(family.lora_targets) == {*anatomy.attention, *anatomy.mlp}, model_type


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # The files on the hub, as they are: GPT-2's is older than most keys, Llama's ties its head.
        ({"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}, 124_439_808),
        (
            {
                "model_type": "llama",
                "hidden_size": 2048,
                "head_dim": 64,
                "intermediate_size": 8192,
                "num_attention_heads": 32,
                "num_hidden_layers": 16,
                "num_key_value_heads": 8,
                "tie_word_embeddings": True,
                "vocab_size": 128256,
            },
            1_235_814_400,
        ),
        (
            {
                "model_type": "phi3",
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "num_key_value_heads": 32,
                "tie_word_embeddings": False,
                "vocab_size": 32064,
            },
            3_821_079_552,
        ),
    ],
    ids=["gpt2", "llama-3.2-1b", "phi-3.5-mini"],
)  # fmt: skip
def test_real_models_have_the_number_of_parameters_that_their_pages_state(
    config: dict[str, Any], parameters: int
) -> None:
    shape = read_shape(config)
    assert shape is not None
    assert shape.parameters == parameters


def test_an_unknown_architecture_has_no_shape() -> None:
    assert read_shape({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10}) is None
    assert read_shape({"model_type": "llama"}) is None
    assert read_shape({"model_type": "llama", "hidden_size": "64"}) is None


def test_weight_files_on_disk_decide_the_number_of_parameters(embedded: ModelSource, tmp_path: Path) -> None:
    shape = measure_shape(embedded)
    assert shape is not None
    assert shape.parameters == 134_515_008
    # Without the files config.json decides; with a wrong vocabulary the two differ.
    assert measure_shape(ModelSource("x", tmp_path, {**embedded.config, "vocab_size": 100})) != shape
    longer = measure_shape(ModelSource("x", embedded.folder, {**embedded.config, "num_hidden_layers": 31}))
    assert longer is not None
    assert longer.parameters == 134_515_008


def test_half_a_download_decides_nothing(embedded: ModelSource) -> None:
    twice = measure_shape(ModelSource("x", embedded.folder, {**embedded.config, "num_hidden_layers": 60}))
    assert twice is not None
    assert twice.parameters == 134_515_008 + 30 * 3_540_096


def test_learned_positions_are_told_from_rotary_ones() -> None:
    assert find_positions({"n_positions": 1024}) == 1024
    assert find_positions({"max_position_embeddings": 8192}) == 8192
    assert find_positions({}) is None
    assert has_learned_positions({"model_type": "gpt2"})
    assert has_learned_positions({"model_type": "gpt_neo"})
    assert not has_learned_positions({"model_type": "gptj"})
    assert not has_learned_positions({"model_type": "unknown"})
