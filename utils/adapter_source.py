"""A finished LoRA adapter on this machine's disk: found and judged before weights are loaded, without a framework."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.exceptions import AdapterError, ModelLoadingError, RecipeError
from utils.model_headers import read_header_bytes, read_json_object
from utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource, iterate_tensor_shapes

MAX_CONFIG_BYTES = 10_000_000
PREFIX = "base_model.model."
Shape = tuple[int, ...]


def find_adapter(name: str, source: ModelSource, where: str) -> Path:
    """Finds the folder of `model.adapter` and checks that it can be folded into this base.

    Args:
        name: an adapter folder in PEFT's format, or a run folder that holds one.
        source: the base model.
        where: `file:line` of model.adapter.

    Raises:
        RecipeError: no such folder, or one without an adapter.
        AdapterError: not safetensors, not LoRA, with tokens of its own, or made for another model.
    """
    asked = Path(name).expanduser()
    folder = asked / "adapter" if (asked / "adapter" / ADAPTER_CONFIG).is_file() else asked
    if not (folder / ADAPTER_CONFIG).is_file():
        what = "trained all weights: name its model/ folder in model.name" if (asked / "model").is_dir() else ""
        fix = what or f"name a run folder that trained with a lora section, or a folder with {ADAPTER_CONFIG}"
        raise RecipeError(f"there is no adapter in {name!r}", where=where, fix=fix, code="no-adapter")
    check_files(folder, where)
    check_kind(folder, where)
    check_fit(folder, source, where)
    return folder


def check_files(folder: Path, where: str) -> None:
    """Only safetensors: a .bin file is a pickle, which runs code when it is read."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        is_pickle = (folder / "adapter_model.bin").is_file()
        message = f"the adapter {'is a pickle (.bin)' if is_pickle else 'has no weights'}"
        fix = f"save it with save_pretrained: the folder then holds {ADAPTER_WEIGHTS}"
        raise AdapterError(message, where=where, fix=fix, code="adapter-files")


def check_kind(folder: Path, where: str) -> None:
    """Folding needs LoRA on an unchanged base and an unchanged vocabulary."""
    config = read_json_object(folder / ADAPTER_CONFIG, where, MAX_CONFIG_BYTES)
    if config.get("peft_type") != "LORA":
        message = f"the adapter is of the type {config.get('peft_type')!r}, and only LoRA can be folded into a base"
        raise AdapterError(message, where=where, fix="name a LoRA adapter", code="adapter-kind")
    if config.get("trainable_token_indices"):
        message = "the adapter brings tokens of its own, which this recipe's tokenizer does not have"
        fix = "merge its run (scripts/merge.py), and name the merged folder in model.name"
        raise AdapterError(message, where=where, fix=fix, code="adapter-kind")
    if isinstance(start := config.get("init_lora_weights"), str) and start not in ("gaussian", "eva", "orthogonal"):
        message = f"the adapter was started by {start}, which changes the base, and was not converted when it was saved"
        fix = "save it with path_initial_model_for_weight_conversion, or train it with Tunebook"
        raise AdapterError(message, where=where, fix=fix, code="adapter-kind")


def check_fit(folder: Path, source: ModelSource, where: str) -> None:
    """Every adapted module exists in the base, with the same inputs and outputs; silent before the base is downloaded."""
    base = dict(iterate_tensor_shapes(source))
    if not base or "quantization_config" in source.config:  # packed weights have other shapes
        return
    for module, inputs, outputs in iterate_adapted_modules(read_shapes(folder, where)):
        shape = find_shape(base, f"{module}.weight")
        if shape is None or tuple(sorted(shape)) != tuple(sorted((inputs, outputs))):
            found = f"has {' × '.join(map(str, shape))}" if shape else "is not there"
            message = (
                f"the adapter does not fit {source.name}: it adapts {module} ({outputs} × {inputs}), which {found}"
            )
            fix = "name the base model that the adapter was trained on in model.name"
            raise AdapterError(message, where=where, fix=fix, code="adapter-mismatch")


def read_shapes(folder: Path, where: str) -> dict[str, Shape]:
    """Name → shape of every tensor of an adapter, from the header of its file."""
    path = folder / ADAPTER_WEIGHTS
    try:
        header: dict[str, Any] = json.loads(read_header_bytes(path))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (ModelLoadingError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise AdapterError(
            f"the adapter's weights are damaged: {path}", where=where, fix="copy the folder again", code="damaged"
        ) from error


def iterate_adapted_modules(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, int, int]]:
    """Yields (module, inputs, outputs) of every pair of A (rank × inputs) and B (outputs × rank)."""
    for name, shape in shapes.items():
        module, found, _ = name.partition(".lora_A.")
        if found and (other := shapes.get(name.replace(".lora_A.", ".lora_B."))):
            yield module.removeprefix(PREFIX), shape[-1], other[0]


def find_shape(base: Mapping[str, Shape], name: str) -> Shape | None:
    """The base's tensor of a name; hub files may leave out the outer modules: `h.0.attn…` for `transformer.h.0.attn…`."""
    parts = name.split(".")
    return next((base[key] for start in range(len(parts)) if (key := ".".join(parts[start:])) in base), None)
