"""What the MLX back end can run, known before weights: the installation, the recipe's keys, the model's config.json.

mlx-lm builds a model from the keys of config.json that it knows, and leaves out the rest without a word: other rotations,
windows and activations then give other predictions. Here its config is made from transformers', and what it would compute
otherwise is refused.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from config.structured_config import Recipe
from utils.exceptions import MachineError, ModelLoadingError, Problem, RecipeError
from utils.machine import is_apple_silicon
from utils.mlx_names import MLX_MODEL_TYPES
from utils.model_source import ModelSource

# Activation functions that mlx-lm builds into an architecture, by transformers' names.
ACTIVATIONS = {
    "gpt2": ("gelu_new", "gelu_pytorch_tanh"),
    "phi": ("gelu_new", "gelu_pytorch_tanh"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), ("gelu_pytorch_tanh", "gelu_new", "gelu")),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), ("silu", "swish")),
}
ROTATIONS = ("default", "linear", "llama3", "yarn")  # of every architecture but those of the next line
PLAIN_ROTATIONS = {"phi": ("default",), "gemma": ("default",), "gemma2": ("default",), "phi3": ("default", "linear")}
LONG_ROTATIONS = ("longrope", "su")
# Switches of config.json that mlx-lm does not read, and the value that it takes for granted.
SWITCHES: dict[str, Mapping[str, Any]] = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False},
    "phi": {"qk_layernorm": False},
    "gemma3_text": {"final_logit_softcapping": None, "attn_logit_softcapping": None, "attention_bias": False},
    **{name: {"attention_bias": False} for name in ("qwen3", "gemma", "gemma2", "phi3")},
}
TIED_TYPES = ("gpt2", "gemma", "gemma2", "gemma3_text")  # share embedding and head where config.json does not say
INSTALL = {"darwin": "pip install mlx-lm==0.32.2 mlx==0.32.4", "linux": "pip install mlx-lm==0.32.2 'mlx[cpu]==0.32.4'"}


def check_mlx_installed(where: str) -> None:
    """Refuses `backend: mlx` where its packages are missing, and says how to get them.

    Args:
        where: `file:line` of `backend`.

    Raises:
        MachineError: mlx or mlx-lm is not installed, or cannot be.
    """
    if is_mlx_installed():
        return
    fix = INSTALL.get(sys.platform)
    message = "backend mlx needs the packages mlx and mlx-lm, which are not installed"
    if fix is None or (sys.platform == "darwin" and not is_apple_silicon()):
        message, fix = "MLX runs on Apple silicon and on Linux, and this is neither", None
    fix = f"{fix}, or set backend: torch" if fix else "set backend: torch"
    raise MachineError(message, where=where, fix=fix, code="no-mlx")


def is_mlx_installed() -> bool:
    """True if both packages are there; neither is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def check_model_format(recipe: Recipe, source: ModelSource, backend: str, where: str) -> None:
    """Refuses a model that the back end lacks, or that it would compute otherwise than transformers.

    Args:
        backend: `torch` or `mlx`.
        where: `file:line` of model.name.

    Raises:
        ModelLoadingError: the architecture, what its config.json asks for, or weights in MLX's format under torch.
        RecipeError: rows that may be longer than what mlx-lm computes rightly; all weights of a quantised model.
    """
    if backend == "torch" and is_stored_quantised(source.config):
        message = "the weights are quantised in MLX's format, which torch does not read"
        fix = "set backend: mlx, or name the model that they were made from"
        raise ModelLoadingError(message, where=where, fix=fix, code="mlx-format")
    if backend == "mlx" and (problem := find_model_problem(recipe, source.config)):
        kind = RecipeError if problem.code in ("mlx-length", "quantised") else ModelLoadingError
        raise kind.from_problems([replace(problem, where=problem.where or where)])


def find_model_problem(recipe: Recipe, config: Mapping[str, Any]) -> Problem | None:
    """Why mlx-lm cannot run a recipe's model as transformers would; None if it can."""
    model_type, fix = str(config.get("model_type", "")), "set backend: torch"
    if trouble := find_config_trouble(config):
        return Problem("mlx-model", f"backend mlx cannot run this model: {trouble}", "", fix)
    limit, why = find_row_limit(model_type, config)
    if limit is not None and recipe.data.max_length > limit:
        message = f"mlx-lm computes this {model_type} rightly up to {limit} tokens: {why}"
        return Problem(
            "mlx-length", message, "data.max_length", f"set data.max_length: {limit} or less, or backend: torch"
        )
    if is_stored_quantised(config) and recipe.lora is None:
        message = (
            "the weights of this model are quantised and frozen, so there is nothing to train without a lora section"
        )
        return Problem("quantised", message, "", "add a lora section")
    return None


def find_config_trouble(config: Mapping[str, Any]) -> str | None:
    """What mlx-lm lacks, or would silently compute otherwise, in words; None if nothing is known."""
    model_type = str(config.get("model_type", ""))
    if model_type not in MLX_MODEL_TYPES:
        return f"its architecture is {model_type!r}, and MLX has {', '.join(sorted(MLX_MODEL_TYPES))} here"
    activation = config.get("hidden_activation") or config.get("hidden_act") or config.get("activation_function")
    if activation is not None and activation not in ACTIVATIONS[model_type]:
        return f"its activation function is {activation!r}, and mlx-lm takes {ACTIVATIONS[model_type][0]!r}"
    for key, usual in SWITCHES.get(model_type, {}).items():
        if config.get(key, usual) != usual:
            return f"config.json sets {key}: {config[key]!r}, which mlx-lm does not read"
    rotation = read_rotation(config)[1]
    kind = str(rotation.get("rope_type") or rotation.get("type") or "default")
    known = PLAIN_ROTATIONS.get(model_type, ROTATIONS)
    if model_type == "phi3":
        known = (*known, *LONG_ROTATIONS)
    if kind not in known:
        return f"its rotary positions are of the kind {kind!r}, which mlx-lm does not have for it"
    if model_type == "gemma3_text" and not has_even_pattern(config):
        return "its layers with and without a window do not alternate as mlx-lm builds them"
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        if "quantization" not in config:
            return f"its weights are quantised by {method!r}, which is for torch"
    return None


def find_row_limit(model_type: str, config: Mapping[str, Any]) -> tuple[int | None, str]:
    """Longest row that mlx-lm computes as transformers does, and why; None for no limit but the model's own."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    honours_windows = model_type == "gemma3_text" or (model_type == "llama" and "layer_types" in config)
    if isinstance(window, int) and not honours_windows:
        return window, "beyond its sliding window it would attend to everything"
    rotation = read_rotation(config)[1]
    if (rotation.get("rope_type") or rotation.get("type")) in LONG_ROTATIONS:
        original = rotation.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        if isinstance(original, int):
            return original, "beyond its original context transformers turns to other rotations"
    return None, ""


def find_own_dropout(config: Mapping[str, Any]) -> float:
    """The largest dropout that the model itself would have in training; mlx-lm's models have none."""
    rates = [value for key, value in config.items() if key.endswith(("_pdrop", "_dropout"))]
    return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)


def read_rotation(config: Mapping[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """Base frequency and further settings of the rotary positions, from either of transformers' two layouts."""
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and isinstance(nested.get("full_attention"), dict):
        nested = nested["full_attention"]
    if isinstance(nested, dict):
        return nested.get("rope_theta", config.get("rope_theta")), nested
    older = config.get("rope_scaling")
    return config.get("rope_theta"), older if isinstance(older, dict) else {}


def is_stored_quantised(config: Mapping[str, Any]) -> bool:
    """True for a model that mlx-lm has written in few bits, such as those of `mlx-community`."""
    return isinstance(config.get("quantization"), dict)


def translate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as mlx-lm reads it: since version 5, transformers keeps the rotation in a section that mlx-lm skips."""
    found = dict(config)
    theta, rotation = read_rotation(config)
    if theta is not None:
        found["rope_theta"] = theta
    if "partial_rotary_factor" in rotation:
        found["partial_rotary_factor"] = rotation["partial_rotary_factor"]
    kind = rotation.get("rope_type") or rotation.get("type") or "default"
    found["rope_scaling"] = None if kind == "default" else {**rotation, "type": kind, "rope_type": kind}
    if kind in LONG_ROTATIONS:
        # mlx-lm takes the long factors for every row. Rows here stay within the original context (`find_row_limit`).
        found["rope_scaling"] |= {"type": "longrope", "long_factor": rotation.get("short_factor")}
    if config.get("model_type") == "gpt2":
        found["n_ctx"] = config.get("n_positions")
    if config.get("model_type") == "gemma3_text":
        found |= translate_gemma3(config)
    # What a config leaves out is transformers' default, and mlx-lm's is another one.
    found.setdefault("tie_word_embeddings", config.get("model_type") in TIED_TYPES)
    return {**found, "rope_parameters": None, "model_file": None}


def list_mlx_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json must say besides for mlx-lm's own tools: left out, they take defaults of theirs without a word.

    transformers reads both layouts.
    """
    if config.get("model_type") not in MLX_MODEL_TYPES:
        return {}
    found = translate_config(config)
    rotation = read_rotation(config)[1]
    if (rotation.get("rope_type") or rotation.get("type")) in LONG_ROTATIONS:
        found["rope_scaling"] = {**rotation, "type": "longrope"}  # both factors: this file is for rows of any length
    return {key: value for key, value in found.items() if key not in config and value is not None}


def translate_gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's second rotation, for the layers with a window, and how often a layer has none."""
    nested = config.get("rope_parameters")
    local = nested.get("sliding_attention", {}) if isinstance(nested, dict) else {}
    found = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    layers = config.get("layer_types")
    if isinstance(layers, list) and "full_attention" in layers:
        found["sliding_window_pattern"] = layers.index("full_attention") + 1
    elif "_sliding_window_pattern" in config:
        found["sliding_window_pattern"] = config["_sliding_window_pattern"]
    return found


def has_even_pattern(config: Mapping[str, Any]) -> bool:
    """True if every n-th layer of a Gemma 3 has no window, and there is one such layer at least."""
    pattern, count = translate_gemma3(config).get("sliding_window_pattern", 6), config.get("num_hidden_layers", 26)
    if not isinstance(pattern, int) or not isinstance(count, int) or not 1 <= pattern <= count:
        return False
    kinds = ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count)]
    return bool(config.get("layer_types", kinds) == kinds)
