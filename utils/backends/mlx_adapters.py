"""Adapters on MLX: mlx-lm's LoRA and DoRA layers on every named module, saved and read in PEFT's format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from config.structured_config import LoraSection, Recipe
from utils.adapter_formats import describe_as_peft
from utils.adapter_reader import CONV1D_TYPES
from utils.adapter_settings import AdapterSettings
from utils.adapter_source import PREFIX, check_files, read_adapter_config
from utils.backends.mlx_model import DTYPES, MlxModel, read_tensors
from utils.exceptions import AdapterError, RecipeError
from utils.logging import get_logger
from utils.mlx_names import to_mlx_module, to_transformers_module
from utils.model_safety import strip_code_keys
from utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_config

Linear = nn.Linear | nn.QuantizedLinear
Adapter: TypeAlias = Any  # LoRALinear or DoRALinear; mlx-lm ships no types
# Tensors of an adapter: ours, PEFT's, and whether PEFT's is turned round.
PARTS = (("lora_a", "lora_A.weight", True), ("lora_b", "lora_B.weight", True), ("m", "lora_magnitude_vector", False))


def attach_lora(model: MlxModel, recipe: Recipe) -> MlxModel:
    """Adds fresh adapters in float32, or makes all weights trainable when the recipe has no lora section.

    A is uniform within 1 / sqrt(inputs) and B is zero, as PEFT has them (arXiv 2106.09685, section 4.1).

    Raises:
        RecipeError: a target matches nothing; the names that exist are shown.
    """
    if recipe.lora is None:
        if model.dtype_name != "float32":  # the trained weights are their own masters
            message = f"weights that are all trained cannot be {model.dtype_name}: small updates would be lost"
            raise RecipeError(message, where="model.dtype", fix="load them as float32", code="dtype")
        model.network.unfreeze()
        return model
    modules = find_targets(model, recipe.lora)
    scale = find_scale(recipe.lora.r, recipe.lora.alpha, is_rslora=recipe.lora.variant == "rslora")
    put_adapters(model.network, dict.fromkeys(modules, (recipe.lora.r, scale)), recipe.lora)
    mx.eval(model.network.parameters())
    return model


def find_targets(model: MlxModel, lora: LoraSection) -> list[str]:
    """Full names of the modules that get an adapter: those with a named last part, or all linear ones of the layers.

    mlx-lm's own trainer compares whole paths inside a layer, so PEFT's names match nothing there, without an error.
    """
    linear = [name for name, module in model.network.named_modules() if isinstance(module, Linear)]
    inside = [name for name in linear if any(part.isdigit() for part in name.split("."))]
    if isinstance(lora.target_modules, str):
        return sorted(inside)
    found = []
    for target in lora.target_modules:
        theirs = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not theirs:
            names = sorted({name.rsplit(".", 1)[-1] for name in linear})
            message, fix = f"no module is called {target!r}", f"modules here: {', '.join(names)}"
            raise RecipeError(message, where="lora.target_modules", fix=fix, code="lora-target")
        found += theirs
    return sorted({*found})


def find_scale(rank: int, alpha: float, *, is_rslora: bool) -> float:
    """What the product of A and B is multiplied by: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if is_rslora else rank)


def put_adapters(network: nn.Module, settings: Mapping[str, tuple[int, float]], lora: LoraSection) -> None:
    """Puts fresh adapters in the place of modules.

    Args:
        settings: full name of a module → rank and scale.
    """
    modules = dict(network.named_modules())
    kind = DoRALinear if lora.variant == "dora" else LoRALinear
    made = [
        (name, kind.from_base(modules[name], r=rank, dropout=lora.dropout, scale=scale))
        for name, (rank, scale) in settings.items()
    ]
    network.update_modules(tree_unflatten(made))


def list_adapters(network: nn.Module) -> dict[str, Adapter]:
    """Adapters by the full names of their modules."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoRALinear | DoRALinear)}


def save_weights(model: MlxModel, folder: Path) -> None:
    """Writes what was trained: adapters in PEFT's format, or the whole model in transformers' when everything was."""
    adapters = list_adapters(model.network)
    if not adapters:
        save_network(model, folder, "float32")
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, adapter in adapters.items():
        for ours, theirs, is_turned in PARTS:
            if ours in adapter:
                key = f"{PREFIX}{to_transformers_module(model.model_type, name)}.{theirs}"
                tensors[key] = mx.contiguous(adapter[ours].T) if is_turned else adapter[ours]
    mx.save_safetensors(str(folder / ADAPTER_WEIGHTS), tensors, metadata={"format": "pt"})
    config = describe_adapters(model, adapters)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def describe_adapters(model: MlxModel, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it."""
    first = next(iter(adapters.values()))
    dropout = round(1 - first.dropout._p_1, 6)
    settings = AdapterSettings(first.lora_a.shape[1], first.scale, dropout, isinstance(first, DoRALinear))
    names = [to_transformers_module(model.model_type, name) for name in adapters]
    return describe_as_peft(settings, names, model.model_type, model.source.public_name)


def load_adapter(model: MlxModel, folder: Path) -> MlxModel:
    """Adds a saved adapter to a base model, frozen; every tensor of the file finds its place, and every place its tensor.

    Raises:
        AdapterError: no adapter there, one that was made for another model, or one with parts that this back end lacks.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        fix = "name a run folder that finished training"
        raise AdapterError("there is no adapter", where=str(folder), fix=fix, code="no-adapter")
    check_files(folder, str(folder))
    config = read_adapter_config(folder, str(folder))
    if other := [key for key in ("modules_to_save", "trainable_token_indices", "alpha_pattern") if config.get(key)]:
        message = f"the adapter has {other[0]}, which backend mlx does not read"
        raise AdapterError(message, where=str(folder), fix="set backend: torch", code="adapter-kind")
    tensors = dict(iterate_parts(model, folder))
    is_rslora, alpha = bool(config.get("use_rslora")), float(config["lora_alpha"])
    ranks = {name: part.shape[1] for (name, ours), part in tensors.items() if ours == "lora_a"}
    settings = {name: (rank, find_scale(rank, alpha, is_rslora=is_rslora)) for name, rank in ranks.items()}
    check_places(model, settings, folder)
    variant: Literal["dora", "lora"] = "dora" if config.get("use_dora") else "lora"
    put_adapters(model.network, settings, LoraSection(variant=variant))
    fill_adapters(model, tensors, folder)
    model.network.freeze()
    model.network.eval()
    return model


def iterate_parts(model: MlxModel, folder: Path) -> Iterator[tuple[tuple[str, str], mx.array]]:
    """Yields module, our name of the part, and the tensor, of an adapter in PEFT's format.

    Raises:
        AdapterError: a tensor that is no part of a LoRA or DoRA adapter.
    """
    for key, tensor in read_tensors(folder / ADAPTER_WEIGHTS).items():
        for ours, theirs, is_turned in PARTS:
            module = key.removesuffix(".weight").removesuffix(f".{theirs.removesuffix('.weight')}")
            if f".{theirs.removesuffix('.weight')}" in key and key.startswith(PREFIX):
                name = to_mlx_module(model.model_type, module.removeprefix(PREFIX))
                yield (name, ours), mx.contiguous(tensor.T) if is_turned else tensor
                break
        else:
            message = f"the adapter does not fit this model: the model has no place for {key}"
            raise AdapterError(message, where=str(folder), code="adapter-mismatch")


def check_places(model: MlxModel, settings: Mapping[str, tuple[int, float]], folder: Path) -> None:
    """Every adapter stands on a linear module of the model."""
    linear = {name for name, module in model.network.named_modules() if isinstance(module, Linear)}
    if not settings or (lost := sorted({*settings} - linear)):
        what = f"the model has no place for {lost[0]}" if settings else "it holds no factor of a linear module"
        message = f"the adapter does not fit this model: {what}"
        raise AdapterError(message, where=str(folder), code="adapter-mismatch")


def fill_adapters(model: MlxModel, tensors: Mapping[tuple[str, str], mx.array], folder: Path) -> None:
    """Gives adapters their numbers, in place; all of them, and in the right shapes.

    Raises:
        AdapterError: a part is missing, left over, or of another shape.
    """
    places = {
        (name, ours): adapter[ours].shape
        for name, adapter in list_adapters(model.network).items()
        for ours, _, _ in PARTS
        if ours in adapter
    }
    if lost := sorted({*places} ^ {*tensors}):
        what = "it has no" if lost[0] in places else "the model has no place for"
        message = f"the adapter does not fit this model: {what} {'.'.join(lost[0])}"
        raise AdapterError(message, where=str(folder), code="adapter-mismatch")
    for place, tensor in tensors.items():
        if tensor.shape != places[place]:
            shapes = f"the shape {tensor.shape}, not {places[place]}"
            message = f"the adapter does not fit this model: {'.'.join(place)} has {shapes}"
            raise AdapterError(message, where=str(folder), code="adapter-mismatch")
    weights = [(".".join(place), tensor.astype(mx.float32)) for place, tensor in tensors.items()]
    model.network.load_weights(weights, strict=False)
    mx.eval(model.network.parameters())


def save_network(model: MlxModel, folder: Path, dtype_name: str) -> None:
    """Writes a plain model in transformers' layout: its names, GPT-2's turned matrices, config and generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[dtype_name]
    tensors = {}
    for name, value in tree_flatten(model.network.parameters()):
        is_matrix = model.model_type in CONV1D_TYPES and name.endswith(
            ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        )
        # GPT-2 is named as in its first files: transformers reads them with `transformer.` and without, mlx-lm only without.
        key = name.removeprefix("model.") if model.model_type in CONV1D_TYPES else name
        tensors[key] = mx.contiguous((value.T if is_matrix else value).astype(dtype))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    config, _ = strip_code_keys(read_config(model.source.folder, str(model.source.folder)))
    kept = {
        key: value for key, value in config.items() if key not in ("quantization", "quantization_config", "torch_dtype")
    }
    (folder / "config.json").write_text(json.dumps({**kept, "dtype": dtype_name}, indent=2) + "\n", encoding="utf-8")
    generation = model.source.folder / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())
    get_logger().debug("Wrote %d tensors to %s", len(tensors), folder)
