"""LoRA adapters converted between the formats of PEFT and mlx-lm, in both directions, without a framework.

PEFT holds `adapter_model.safetensors`, with A as rank × inputs and B as outputs × rank, and multiplies B·A by alpha / r (with
rsLoRA by alpha / √r). mlx-lm 0.32.2 holds `adapters.safetensors`, with `lora_a` as inputs × rank and `lora_b` as rank ×
outputs, and multiplies by `scale`; DoRA's magnitude `m` is the same vector. The numbers keep their format and their bits:
matrices are transposed, and the scale is another way to write alpha. What the other side cannot hold is refused by name, see
`plain_adapters.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.adapter_reader import CONV1D_TYPES
from utils.adapter_settings import AdapterSettings
from utils.adapter_source import PREFIX
from utils.cache_entries import open_or_build
from utils.cache_keys import hash_code, hash_facts
from utils.logging import get_logger
from utils.mlx_names import to_mlx_module
from utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource, hash_file
from utils.plain_adapters import (
    MLX_PARTS,
    MLX_WEIGHTS,
    Factors,
    PlainAdapter,
    count_layers,
    read_mlx_adapter,
    read_peft_adapter,
    split_layer,
)
from utils.tensor_files import ITEM_BYTES, StoredTensor, format_header

CHAT_TEMPLATE = "chat_template.jinja"  # what the adapter was trained with lies beside it, in either format
PEFT_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
CODE = ("adapter_formats.py", "plain_adapters.py", "adapter_settings.py", "mlx_names.py")


def is_mlx_adapter(folder: Path) -> bool:
    """True for a folder with an adapter in mlx-lm's format."""
    return (folder / MLX_WEIGHTS).is_file() and not (folder / ADAPTER_WEIGHTS).is_file()


def convert_to_mlx(folder: Path, source: ModelSource, target: Path, where: str) -> PlainAdapter:
    """Writes an adapter in PEFT's format as one that `mlx_lm.generate --adapter-path` reads.

    Args:
        folder: holds adapter_model.safetensors.
        source: the adapter's base.
        target: an empty folder.
        where: what named the folder, for errors.

    Raises:
        AdapterError: damaged, or something in it that mlx-lm's format cannot hold.
    """
    adapter = read_peft_adapter(folder, source, where)
    modules = {to_mlx_module(source.model_type, name): factors for name, factors in adapter.modules.items()}
    count, keys = describe_modules(modules, source)
    config = {
        "model": source.public_name,
        "fine_tune_type": "dora" if adapter.is_dora else "lora",
        "num_layers": count,
        "lora_parameters": {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": keys},
    }
    write_transposed(name_tensors(modules, "", MLX_PARTS), target / MLX_WEIGHTS, {"format": "mlx"})
    write_companions(folder, config, target)
    return adapter


def describe_modules(modules: Iterable[str], source: ModelSource) -> tuple[int, list[str]]:
    """How mlx-lm is told which modules have adapters.

    Returns:
        num_layers and keys: names inside a layer where the last layers all have the same modules, as mlx-lm's own trainer
        writes them; else every full name.
    """
    layers = count_layers(source)
    places = [split_layer(name, source.model_type) for name in modules]
    inner: dict[int, set[str]] = {}
    for number, name in (place for place in places if place):
        inner.setdefault(number, set()).add(name)
    keys = next(iter(inner.values()), set())
    is_tail = set(inner) == set(range(layers - len(inner), layers)) and all(names == keys for names in inner.values())
    return (len(inner), sorted(keys)) if is_tail and all(places) else (layers, sorted(modules))


def convert_to_peft(folder: Path, source: ModelSource, target: Path, where: str, base_name: str = "") -> PlainAdapter:
    """Writes an adapter in mlx-lm's format as one that PEFT reads.

    Args:
        folder: holds adapters.safetensors.
        source: the adapter's base.
        target: an empty folder.
        where: what named the folder, for errors.
        base_name: what the adapter names as its base.

    Raises:
        AdapterError: damaged, or something in it that is no plain adapter.
    """
    adapter = read_mlx_adapter(folder, source, where)
    config = describe_as_peft(adapter, adapter.modules, source.model_type, base_name)
    write_transposed(name_tensors(adapter.modules, PREFIX, PEFT_PARTS), target / ADAPTER_WEIGHTS, {"format": "pt"})
    write_companions(folder, config, target)
    return adapter


def describe_as_peft(
    adapter: AdapterSettings, modules: Iterable[str], model_type: str, base_name: str
) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it; alpha is the scale times the rank, which is what it stands for in both.

    Args:
        modules: that carry the adapter, by their names in transformers.
        base_name: what it names as its base.
    """
    alpha = adapter.scale * adapter.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.is_dora,
        "bias": "none",
        "fan_in_fan_out": model_type in CONV1D_TYPES,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }


def open_as_peft(folder: Path, source: ModelSource, where: str) -> Path:
    """The cached copy of mlx-lm's adapter in PEFT's format; made on first use.

    Its bytes follow from the two files and the base's shape alone, because a run records their hash.

    Raises:
        AdapterError: as `convert_to_peft`.
    """
    files = [folder / name for name in (ADAPTER_CONFIG, MLX_WEIGHTS, CHAT_TEMPLATE)]
    facts = {
        "files": [hash_file(path) if path.is_file() else None for path in files],
        "base": [source.model_type, count_layers(source), source.config.get("tie_word_embeddings")],
        "code": hash_code(CODE),
    }

    def build(entry: Path) -> dict[str, Any]:
        convert_to_peft(folder, source, entry, where)
        return {}

    entry, _ = open_or_build(hash_facts(facts), (ADAPTER_CONFIG, ADAPTER_WEIGHTS), build, kind="adapters")
    get_logger().info("%s is in mlx-lm's format; it is read through a copy in PEFT's, %s", folder, entry)
    return entry


def name_tensors(modules: Mapping[str, Factors], prefix: str, parts: Sequence[str]) -> dict[str, StoredTensor]:
    """The tensors of all modules under the names of a format.

    Args:
        parts: what the format calls A, B and the magnitude.
    """
    return {
        f"{prefix}{module}.{part}": tensor
        for module, factors in modules.items()
        for part, tensor in zip(parts, (factors.a, factors.b, factors.magnitude), strict=True)
        if tensor
    }


def write_transposed(tensors: Mapping[str, StoredTensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors of other files under new names: matrices transposed, vectors and number formats as they are.

    The order is that of safetensors' own writer: large numbers first, then by name.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0]))
    header = format_header([(name, tensor.dtype, tensor.shape[::-1]) for name, tensor in ordered], metadata)
    with path.open("wb") as file:
        file.write(header)
        for _, tensor in ordered:
            file.write(np.ascontiguousarray(read_bits(tensor).T).data)


def read_bits(tensor: StoredTensor) -> np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]:
    """A stored tensor as unsigned integers of its numbers' size: no format is left out, and no bit is changed."""
    item = ITEM_BYTES[tensor.dtype]
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.size), f"<u{item}").reshape(tensor.shape)


def write_companions(folder: Path, config: Mapping[str, Any], target: Path) -> None:
    """Writes adapter_config.json, and takes the chat template along that lies beside an adapter of Tunebook's."""
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (folder / CHAT_TEMPLATE).is_file():
        shutil.copyfile(folder / CHAT_TEMPLATE, target / CHAT_TEMPLATE)
