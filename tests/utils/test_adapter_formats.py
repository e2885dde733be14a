"""An adapter predicts the same in PEFT and in mlx-lm, whichever of the two made it, for every architecture that is supported.

The bases are small random models of transformers. mlx-lm reads some of their settings from other places of config.json (rotation
base and share, positions) and GPT-2's weights without the name of the outermost module: `write_base` says both, so that the two
sides compute one model, and a difference is the adapter's.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from config.structured_config import ModelSection
from utils.adapter_formats import convert_to_mlx, convert_to_peft, is_mlx_adapter
from utils.adapter_source import find_adapter
from utils.mlx_names import MLX_MODEL_TYPES
from utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource, find_model
from utils.plain_adapters import MLX_WEIGHTS

LAYERS = 3
IDS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3]]
# Weights as large as trained ones: with the usual 0.02 a norm, a score or an adapter would change nothing.
SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **SMALL,
}
# Every third layer sees all of the text: with mlx-lm's six, a model of three layers would have none.
GEMMA3 = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
OLD = {"n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, **SMALL}
NARROW = {"head_dim": 4}  # no setting of these types: the width is shared among the heads
OWN_SHAPES = {"phi": NARROW, "phi3": NARROW, "qwen2": NARROW, "gemma3_text": GEMMA3}
EVERY_TYPE = pytest.mark.parametrize("model_type", sorted(MLX_MODEL_TYPES))
VARIANTS = [
    {"lora_alpha": 16},
    {"lora_alpha": 7, "use_rslora": True},
    {"lora_alpha": 12, "use_dora": True},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelSource, nn.Module]]:
    """Every architecture in a folder that both sides read alike, and as transformers' model."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: write_base(name, folder / name) for name in sorted(MLX_MODEL_TYPES)}


def write_base(model_type: str, folder: Path, **settings: Any) -> tuple[ModelSource, nn.Module]:
    """A random model; names and settings that mlx-lm looks for elsewhere stand in both places."""
    torch.manual_seed(0)
    values = OLD if model_type == "gpt2" else {**SHAPE, **OWN_SHAPES.get(model_type, {})}
    config = AutoConfig.for_model(model_type, **{**values, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if model_type == "gemma":  # mlx-lm computes the exact GELU, transformers the approximation with tanh
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.GELU()
    model.save_pretrained(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    written = json.loads(path.read_text(encoding="utf-8"))
    rope = written.get("rope_parameters") or {}
    moved = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    path.write_text(json.dumps({**written, **moved, "n_ctx": 64, "sliding_window_pattern": 3}), encoding="utf-8")
    if model_type == "gpt2":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    return find_model(ModelSection(name=str(folder)), "test", with_weights=True), model


def make_peft_adapter(model: nn.Module, folder: Path, **settings: Any) -> np.ndarray:
    """A PEFT adapter with random numbers in all of its parts; returns its logits."""
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    is_gpt2 = model.config.model_type == "gpt2"
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(fan_in_fan_out=is_gpt2, **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return compute(adapted)


def compute(model: nn.Module) -> np.ndarray:
    """Logits of transformers."""
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def compute_in_mlx(source: ModelSource, adapter: Path | None = None) -> np.ndarray:
    """Logits of mlx-lm, the adapter read by its own loader."""
    model, _ = load_model(source.folder)
    if adapter:
        load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(IDS)))


def compute_in_peft(model: nn.Module, folder: Path) -> np.ndarray:
    """Logits of transformers with an adapter that PEFT reads."""
    return compute(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval())


def make_mlx_adapter(
    source: ModelSource, folder: Path, *, kind: str = "lora", layers: int = -1, **settings: Any
) -> np.ndarray:
    """An adapter that mlx-lm itself has made and saved as its trainer does, with random numbers; returns its logits."""
    parameters = {"rank": 4, "scale": 3.3, "dropout": 0.1, **settings}
    model, _ = load_model(source.folder)
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    trained = tree_map(lambda one: one + 0.1 * mx.random.normal(one.shape), model.trainable_parameters())
    model.update(trained)
    model.eval()
    folder.mkdir()
    arguments = {
        "fine_tune_type": kind,
        "num_layers": layers,
        "lora_parameters": parameters,
        "model": "any",
        "iters": 10,
    }
    save_config(arguments, folder / ADAPTER_CONFIG)
    mx.save_safetensors(str(folder / MLX_WEIGHTS), dict(tree_flatten(model.trainable_parameters())))
    return np.array(model(mx.array(IDS)))


def convert(source: ModelSource, adapter: Path, target: Path) -> Path:
    """Converts an adapter into the other format."""
    target.mkdir()
    (convert_to_peft if is_mlx_adapter(adapter) else convert_to_mlx)(adapter, source, target, "test")
    return target


@EVERY_TYPE
def test_an_adapter_of_peft_predicts_the_same_in_mlx_lm_and_comes_back_to_the_byte(
    bases: dict[str, tuple[ModelSource, nn.Module]], model_type: str, tmp_path: Path
) -> None:
    source, model = bases[model_type]
    base = compute(model)
    np.testing.assert_allclose(compute_in_mlx(source), base, atol=1e-4)
    for number, variant in enumerate(VARIANTS):
        expected = make_peft_adapter(model, tmp_path / f"{number}", **variant)
        assert np.abs(expected - base).max() > 0.05  # an adapter that does nothing would prove nothing
        there = convert(source, tmp_path / f"{number}", tmp_path / f"{number}_mlx")
        np.testing.assert_allclose(compute_in_mlx(source, there), expected, atol=1e-4)
        back = convert(source, there, tmp_path / f"{number}_peft")
        weights = [(folder / ADAPTER_WEIGHTS).read_bytes() for folder in (tmp_path / f"{number}", back)]
        assert weights[0] == weights[1]


@EVERY_TYPE
def test_an_adapter_of_mlx_lm_predicts_the_same_in_peft_and_comes_back_to_the_byte(
    bases: dict[str, tuple[ModelSource, nn.Module]], model_type: str, tmp_path: Path
) -> None:
    source, model = bases[model_type]
    base = compute(model)
    # mlx-lm adapts the last 16 layers by default: here the last two of three.
    for kind, layers in (("lora", 2), ("dora", -1)):
        expected = make_mlx_adapter(source, tmp_path / kind, kind=kind, layers=layers)
        assert np.abs(expected - base).max() > 0.05
        found = find_adapter(str(tmp_path / kind), source, "test")
        np.testing.assert_allclose(compute_in_peft(model, found), expected, atol=1e-4)
        back = convert(source, found, tmp_path / f"{kind}_mlx")
        pair = [mx.load(str(folder / MLX_WEIGHTS)) for folder in (tmp_path / kind, back)]
        assert {*pair[0]} == {*pair[1]}
        assert all(np.array_equal(pair[0][name], pair[1][name]) for name in pair[0])
        np.testing.assert_allclose(compute_in_mlx(source, back), expected, atol=1e-6)
