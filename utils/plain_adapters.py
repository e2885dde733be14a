"""A LoRA adapter as both PEFT and mlx-lm can hold it, read from the files of either without a framework.

Plain is: low-rank factors on linear modules, with or without DoRA's magnitudes, of one rank and one scale. Whatever else a
folder says is refused by name. A stranger may have written it: sizes are looked at before they are used, and nothing in it is
executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.adapter_changes import show
from utils.adapter_reader import FACTOR
from utils.adapter_settings import (
    COPY_FIX,
    MERGE_FIX,
    AdapterSettings,
    check_peft_config,
    find_common_scale,
    is_list_of_names,
    read_dropout,
    read_scale,
    refuse,
)
from utils.adapter_source import PREFIX, read_adapter_config, read_adapter_json, read_tensors
from utils.mlx_names import HEADLESS_TYPES, MLX_MODEL_TYPES, name_mlx_layers, to_mlx_module, to_transformers_module
from utils.model_source import ADAPTER_WEIGHTS, ModelSource
from utils.tensor_files import FLOATS, StoredTensor

MLX_WEIGHTS = "adapters.safetensors"
MLX_PARTS = ("lora_a", "lora_b", "m")
PARTS = ("a", "b", "magnitude")
FUSE_FIX = "fuse it (mlx_lm.fuse --model … --adapter-path …), and name the fused folder in model.name"
LAYER = re.compile(r"([0-9]{1,6})\.(.+)")
EMBEDDINGS = ("wte", "wpe", "embed_tokens")


@dataclass(frozen=True)
class Factors:
    """What stands on one module: A, B and DoRA's magnitude, laid out as their file has them."""

    a: StoredTensor
    b: StoredTensor
    magnitude: StoredTensor | None = None


@dataclass(frozen=True)
class PlainAdapter(AdapterSettings):
    """A LoRA adapter with one rank and one scale.

    Attributes:
        is_transposed: A is inputs × rank and B rank × outputs, as mlx-lm has them.
        modules: by their names in transformers, in the order of the file.
    """

    is_transposed: bool
    modules: Mapping[str, Factors]


def read_peft_adapter(folder: Path, source: ModelSource, where: str) -> PlainAdapter:
    """Reads an adapter in PEFT's format.

    Args:
        source: its base.
        where: what named the folder, for errors.

    Raises:
        AdapterError: damaged, or something in it that mlx-lm's format cannot hold; it is named.
    """
    check_architecture(source, where)
    config = read_adapter_config(folder, where)
    check_peft_config(config, where)
    found = []
    for tensor in read_tensors(folder / ADAPTER_WEIGHTS, where):
        match = FACTOR.fullmatch(tensor.name.removeprefix(PREFIX)) if tensor.name.startswith(PREFIX) else None
        if match is None:
            raise refuse(f"{tensor.name} is no factor of a linear module", where)
        part = {"A": "a", "B": "b"}.get(tensor.name.removesuffix(".weight")[-1], "magnitude")
        found.append((match[1], part, tensor))
    is_dora = bool(config.get("use_dora"))
    modules = group_factors(found, is_dora, where)
    rank, scale = find_common_scale(config, modules, where)
    dropout = read_dropout(config.get("lora_dropout"), where)
    return check_adapter(PlainAdapter(rank, scale, dropout, is_dora, False, modules), source, where)


def read_mlx_adapter(folder: Path, source: ModelSource, where: str) -> PlainAdapter:
    """Reads an adapter in mlx-lm's format, as strictly as mlx-lm's own loader and without its silence about missing tensors.

    Args, Raises: as `read_peft_adapter`.
    """
    check_architecture(source, where)
    config = read_adapter_json(folder, where)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise refuse(f"adapter_config.json says fine_tune_type: {kind!r}, which is no adapter", where, FUSE_FIX)
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or type(rank := parameters.get("rank")) is not int or rank < 1:
        raise refuse("adapter_config.json does not say lora_parameters with a rank above 0", where, COPY_FIX)
    scale, dropout = read_scale(parameters.get("scale"), where), read_dropout(parameters.get("dropout"), where)
    tensors = [(tensor.name.rpartition("."), tensor) for tensor in read_tensors(folder / MLX_WEIGHTS, where)]
    for (module, _, part), tensor in tensors:
        if part not in MLX_PARTS or not module:
            raise refuse(f"{tensor.name} is no part of an adapter", where, COPY_FIX)
    names = dict(zip(MLX_PARTS, PARTS, strict=True))
    found = [(module, names[part], tensor) for (module, _, part), tensor in tensors]
    modules = group_factors(found, kind == "dora", where)
    check_mlx_places(modules, config, source, where)
    renamed = {to_transformers_module(source.model_type, name): factors for name, factors in modules.items()}
    return check_adapter(PlainAdapter(rank, scale, dropout, kind == "dora", True, renamed), source, where)


def check_mlx_places(modules: Iterable[str], config: Mapping[str, Any], source: ModelSource, where: str) -> None:
    """Every module is one that mlx-lm would adapt by this configuration, and each adapted layer has all of them.

    mlx-lm adapts the last `num_layers` layers, or all where that is not above 0: the modules that `keys` names, inside a layer
    or in full, and all linear ones without `keys`. It leaves a module without tensors as it is, and says nothing.

    Raises:
        AdapterError: a module without its place, or a place without its module.
    """
    keys, count = config["lora_parameters"].get("keys"), config.get("num_layers")
    if type(count) is not int or not (keys is None or is_list_of_names(keys)):
        raise refuse("adapter_config.json says no num_layers, or keys that are no list of names", where, COPY_FIX)
    layers = count_layers(source)
    adapted = range(max(layers - count, 0) if count > 0 else 0, layers)
    found, used = {*modules}, set()
    for name in found - {*(keys or ())}:
        place = split_layer(name, source.model_type)
        if place is None or place[0] not in adapted or (keys is not None and place[1] not in keys):
            message = (
                f"mlx-lm would have no place for {name}: keys and num_layers of adapter_config.json do not name it"
            )
            raise refuse(message, where, COPY_FIX)
        used.add(place[1])
    names = (f"{name_mlx_layers(source.model_type)}.{layer}.{inner}" for layer in adapted for inner in sorted(used))
    if lost := next((name for name in names if name not in found), None):
        raise refuse(f"it has no {lost}.lora_a, and other layers have", where, "copy the folder again")


def split_layer(name: str, model_type: str) -> tuple[int, str] | None:
    """Number of the layer that a module of mlx-lm's is in and its name there; None outside of the layers."""
    inside = name.removeprefix(f"{name_mlx_layers(model_type)}.")
    match = LAYER.fullmatch(inside) if inside != name else None
    return (int(match[1]), match[2]) if match else None


def count_layers(source: ModelSource) -> int:
    """Layers of the base, as its config.json says."""
    count = source.config.get("num_hidden_layers") or source.config.get("n_layer")
    return count if isinstance(count, int) else 0


def group_factors(found: Sequence[tuple[str, str, StoredTensor]], is_dora: bool, where: str) -> dict[str, Factors]:
    """Puts the tensors of each module together; every tensor is used once.

    Args:
        found: module, part (`a`, `b` or `magnitude`) and tensor.

    Raises:
        AdapterError: a module that lacks a part, or has one too many.
    """
    wanted = {"a", "b", "magnitude"} if is_dora else {"a", "b"}
    parts: dict[str, dict[str, StoredTensor]] = {}
    for module, part, tensor in found:
        if part not in wanted or part in parts.setdefault(module, {}):
            raise refuse(f"the adapter has no place for {tensor.name}", where, COPY_FIX)
        parts[module][part] = tensor
    if not parts:
        raise refuse("the adapter holds no tensors", where, COPY_FIX)
    for module, named in parts.items():
        if lost := sorted(wanted - {*named}):
            names = {"a": "factor A", "b": "factor B", "magnitude": "magnitude"}
            raise refuse(f"{module} lacks its {names[lost[0]]}", where, "copy the folder again")
    return {module: Factors(**named) for module, named in parts.items()}


def check_adapter(adapter: PlainAdapter, source: ModelSource, where: str) -> PlainAdapter:
    """Every module is one that both sides can adapt, and shapes agree with the rank and with each other.

    Raises:
        AdapterError: experts, an embedding, a head that is the embedding, another format than floats, or a wrong shape.
    """
    fix = FUSE_FIX if adapter.is_transposed else MERGE_FIX
    for name, factors in adapter.modules.items():
        check_module(name, source, where, fix)
        shapes = [tensor.shape[::-1] if adapter.is_transposed else tensor.shape for tensor in (factors.a, factors.b)]
        if any(len(shape) == 3 for shape in shapes):
            raise refuse(
                f"{factors.a.name} adapts the experts of a mixture, and only linear modules travel", where, fix
            )
        (a, b), rank = shapes, adapter.rank
        if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rank, rank) or 0 in (*a, *b):
            shown = f"{factors.a.name} is {show(factors.a.shape)} and {factors.b.name} {show(factors.b.shape)}"
            raise refuse(f"{shown}, and the rank is {rank}", where, COPY_FIX)
        if factors.magnitude and factors.magnitude.shape != (b[0],):
            message = f"{factors.magnitude.name} is {show(factors.magnitude.shape)}, and should be {b[0]}"
            raise refuse(message, where, COPY_FIX)
        for tensor in (factors.a, factors.b, factors.magnitude):
            if tensor and tensor.dtype not in FLOATS.values():
                raise refuse(f"{tensor.name} is stored as {tensor.dtype}, which is no float", where, COPY_FIX)
    return adapter


def check_module(name: str, source: ModelSource, where: str, fix: str) -> None:
    """Refuses a module, by its name in transformers, that mlx-lm does not have as a linear module of its own."""
    if name.rpartition(".")[2] in EMBEDDINGS:
        raise refuse(f"{name} is an embedding, and only adapters on linear modules travel", where, fix)
    if name == "lm_head":
        # mlx-lm and transformers fill in different defaults where config.json does not say it.
        if source.model_type in HEADLESS_TYPES or source.config.get("tie_word_embeddings") is not False:
            raise refuse("lm_head shares the embedding's matrix here, and mlx-lm then has no module for it", where, fix)
        return
    place = split_layer(to_mlx_module(source.model_type, name), source.model_type)
    if place is None or place[0] >= count_layers(source):
        raise refuse(f"{source.name} has no layer for {name}", where, "name the base that the adapter was trained on")


def check_architecture(source: ModelSource, where: str) -> None:
    """Refuses architectures whose modules have no tested counterpart in mlx-lm."""
    if source.model_type not in MLX_MODEL_TYPES:
        known = ", ".join(sorted(MLX_MODEL_TYPES))
        raise refuse(
            f"{source.name} is of the type {source.model_type!r}", where, f"types that can be converted: {known}"
        )
